"""Runs `interpreted/` in a second pytest whose kernels are interpreted on the CPU; see the conftest there for why."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).with_name("interpreted")


@pytest.mark.slow
def test_interpreted_kernels_equal_their_references() -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--confcutdir={FOLDER}", str(FOLDER)]
    done = subprocess.run(
        command,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    summary = done.stdout.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed is not None
    assert int(passed[1]) > 100, summary
    assert "skipped" not in summary, summary
