"""Every plugin node, run by the kernels, arguments and grids that TensorRT is given, in triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton has no wheel for this platform")

BOUNDED = ("image, bounded", "tokens, bounded", "image, bounded, channels last")
NODES = ("image", "image, channels last", "tokens", *BOUNDED, "linear", "conv, stride 1", "conv, stride 2")
CASES = (*NODES, *(f"{node}, regular" for node in NODES))


@pytest.fixture(scope="module")
def mismatches() -> dict[str, list[int]]:
    """What `interpreted.py` prints: the interpreter is chosen before triton is imported, hence a process of its own."""
    script = Path(__file__).with_name("interpreted.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def test_every_case_was_run(mismatches: dict[str, list[int]]) -> None:
    assert tuple(mismatches) == CASES
    assert all(len(tactics) >= 2 for tactics in mismatches.values())


@pytest.mark.parametrize("case", CASES)
def test_every_tactic_gives_the_definition(case: str, mismatches: dict[str, list[int]]) -> None:
    assert mismatches[case] == [0] * len(mismatches[case])  # exact: no operation of these inputs rounds
