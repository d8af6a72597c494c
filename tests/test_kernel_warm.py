"""`scripts/kernel_warm.py` without a GPU: what is written down, and that the real launch finds it compiled."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
pytest.importorskip("triton")

CODE = """
import json, sys
from pathlib import Path

import kernel_warm
import torch

from hqc.kernels.launching import launch_kernel
from hqc.kernels.options import HadamardOptions

if __name__ == "__main__":
    cache, x = Path(sys.argv[1]), torch.zeros(64, 64, dtype=torch.float16)
    inverse, codes = torch.ones(1), torch.zeros(64, 64, dtype=torch.int8)

    def launch(rows):
        launch_kernel("test", HadamardOptions(tile_rows=16), (1, 1), (x, None, inverse, rows, 64, rows, codes))

    def compiled():
        return sorted(str(path.relative_to(cache)) for path in cache.rglob("*.cubin"))

    with kernel_warm.recording() as found:
        for rows in (64, 128, 63, 61):
            launch(rows)
    failed = kernel_warm.compile_all(list(found), 90, 1)
    before = compiled()
    # As the launch itself would ask for it, which is not run.
    kernel_warm.start_worker(90)
    from triton.runtime.jit import JITFunction
    run = JITFunction.run
    JITFunction.run = lambda self, *a, grid, warmup, **settings: run(self, *a, grid=grid, warmup=True, **settings)
    for rows in (64, 63):
        launch(rows)
    print(json.dumps([len(found), failed, before, compiled()]))
"""


def test_what_is_compiled_ahead_is_what_is_launched(tmp_path: Path) -> None:
    """Two different launches of four; the cache holds what the launches ask for."""
    script = tmp_path / "warm.py"
    script.write_text(CODE)
    cache = tmp_path / "cache"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}"}
    command = [sys.executable, str(script), str(cache)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, failed, before, after = json.loads(done.stdout)
    assert (count, failed) == (2, [])
    assert len(before) == 2
    assert after == before


@pytest.fixture
def warm(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import kernel_warm

    return kernel_warm


def test_only_what_decides_the_code_is_kept(warm: ModuleType) -> None:
    x = torch.zeros(32, dtype=torch.float16)
    launch = warm.described("m", "f", (x, None, 48, 7, 1, 2**31, True), {"TILE": 48, "num_warps": 4})
    assert launch.arguments == (torch.float16, None, 16, 3, 1, 2**31, True)
    assert launch.settings == (("TILE", 48), ("num_warps", 4))
    assert launch == warm.described("m", "f", (x + 1, None, 64, 9, 1, 2**31, True), {"TILE": 48, "num_warps": 4})
    assert warm.described("m", "f", (x[1:],), {}) is None  # not aligned as the compiler supposes


def test_one_that_does_not_compile_is_said(warm: ModuleType) -> None:
    said = warm.compile_launch(warm.Launch("hqc.kernels.jit.hadamard_quantize", "no_such_kernel", (), ()))
    assert said.startswith("no_such_kernel: AttributeError")
