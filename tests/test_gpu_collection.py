"""`pytest -m gpu tests` where only what the kernels need is installed, as on a bare machine with a GPU."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ABSENT = "fastapi, starlette, uvicorn, httpx, diffusers, transformers, accelerate, sklearn, torchmetrics, hypothesis"

PLUGIN = f"""
import sys

import torch

for absent in "{ABSENT}".split(", "):
    sys.modules[absent] = None  # importing it fails, and looking for it finds nothing
torch.cuda.is_available = lambda: True
torch.cuda.get_device_name = lambda *_: "Some Card"
"""


def test_gpu_tests_are_collected_without_the_packages_of_others(tmp_path: Path) -> None:
    (tmp_path / "bare_machine.py").write_text(PLUGIN)
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")}
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pytest", "-p", "bare_machine", "-p", "pytest_timeout", "-p", "no:cacheprovider"]
    command += ["--collect-only", "-q", "-m", "gpu", "tests"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "error" not in done.stdout.splitlines()[-1]
    found = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    assert {
        "tests/plugins/test_plugins_gpu.py::test_images",
        "tests/runtimes/test_runtimes_cuda_gpu.py::test_one_capture_serves_mixed_timesteps",
        "tests/runtimes/test_runtimes_tensorrt_exports.py::test_one_graph_serves_every_timestep",
    } <= found
    assert any(name.startswith("tests/kernels/interpreted/") for name in found)
