"""These tests run the kernels: in triton's interpreter on the CPU, or compiled on a GPU.

The interpreter is chosen when triton is imported, for the whole process, and torch imports triton by itself. So nothing
here is collected in an ordinary run without a GPU: `test_kernels_interpreted.py` starts a second pytest on this folder
with TRITON_INTERPRET=1 in its environment. With a GPU an ordinary run collects them, compiled, marked gpu.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
RUNS_HERE = INTERPRETED or torch.cuda.is_available()
collect_ignore_glob = [] if RUNS_HERE else ["test_*.py"]

torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        for item in items:
            if "interpreted" in item.path.parts:
                item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    """Where the kernels run."""
    return "cpu" if INTERPRETED else "cuda"
