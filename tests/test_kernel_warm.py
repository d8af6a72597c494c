"""`scripts/kernel_warm.py` without a GPU: its command line, and that the real launch finds what it compiled."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hqc.kernels.precompile import KernelJob

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")

CODE = """
import json, sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import kernel_warm
import torch
from pretended_card import pretended_card

from hqc.kernels.launching import launch_kernel
from hqc.kernels.options import HadamardOptions
from hqc.kernels.precompile import instead_of_launching

if __name__ == "__main__":
    from triton.runtime.jit import JITFunction

    cache, x = Path(sys.argv[1]), torch.zeros(64, 64, dtype=torch.float16)
    inverse, codes = torch.ones(1), torch.zeros(64, 64, dtype=torch.int8)

    def launch(rows):
        launch_kernel("test", HadamardOptions(tile_rows=16), (1, 1), (x, None, inverse, rows, 64, rows, codes))

    def compiled():
        return sorted(str(path.relative_to(cache)) for path in cache.rglob("*.cubin"))

    stack = ExitStack()
    stack.enter_context(pretended_card())
    with instead_of_launching() as jobs:
        for rows in (64, 128, 63, 61):
            launch(rows)
    different = list({job.key(): job for job in jobs}.values())
    failed = kernel_warm.compile_all([*different, replace(jobs[0], constants={})], 1)
    before = compiled()
    # As the launch itself would ask for it, which is not run.
    run = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **settings: run(self, *a, grid=grid, warmup=True, **settings)
    for rows in (64, 63):
        launch(rows)
    print(json.dumps([len(different), failed, before, compiled()]))
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path: Path) -> None:
    """Two different launches of four; the cache holds what the launches ask for; what does not compile has a reason."""
    script = tmp_path / "warm.py"
    script.write_text(CODE)
    cache = tmp_path / "cache"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}:{ROOT / 'tests'}"}
    command = [sys.executable, str(script), str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, failed, before, after = json.loads(done.stdout)
    assert count == 2
    assert len(before) == 2
    assert after == before
    assert len(failed) == 1
    assert failed[0].startswith("hadamard_quantize_rows: triton cannot compile it: ")


def test_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Equal kernels are counted once; what went wrong is said, and is no failure: the launch will compile it."""
    import kernel_warm

    job = KernelJob("m", "f", {}, {}, {}, {}, ("cuda", 90, 32))
    asked: list[object] = []
    monkeypatch.setattr(sys, "argv", ["kernel_warm.py", "q.hqc", "--batch-size", "8,2", "--workers", "3"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_warm, "of_program", lambda *given: asked.append(given) or [job, replace(job), job])
    monkeypatch.setattr(kernel_warm, "compile_all", lambda *given: asked.append(given) or ["f: no"])
    assert kernel_warm.main() == 0
    said = capsys.readouterr()
    assert asked == [(Path("q.hqc"), [8, 2]), ([job], 3)]
    assert said.out.startswith("1 kernels, 1 failed, ")
    assert said.out.endswith(" to compile, 3 processes\n")
    assert said.err == "f: no\n"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import kernel_warm

    monkeypatch.setattr(sys, "argv", ["kernel_warm.py", "q.hqc"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="2"):
        kernel_warm.main()
