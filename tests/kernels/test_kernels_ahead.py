"""Other processes compile into triton's cache from the end of the list; nothing depends on them."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from hqc.kernels import ahead
from hqc.kernels.ahead import Compilation, compiled_ahead

JOBS: list[Compilation] = [("hadamard_quantize", "fp16", {"block": i}, "sm_80") for i in range(40)]


class Process:
    """Notes what becomes of it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def kill(self) -> None:
        self.said.append("killed")

    def wait(self) -> None:
        self.said.append("waited for")


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Compilation], Process]]:
    """The jobs of every process that would be begun."""
    found: list[tuple[list[Compilation], Process]] = []

    def begin(jobs: list[Compilation]) -> Process:
        found.append((list(jobs), Process()))
        return found[-1][1]

    monkeypatch.setattr(ahead, "_begin", begin)
    monkeypatch.setattr(ahead, "available_bytes", lambda: 64 << 30)
    return found


@pytest.mark.parametrize(
    ("cores", "jobs", "memory", "processes"),
    [(1, 40, 64, 0), (2, 40, 64, 1), (8, 40, 64, 2), (8, 15, 64, 0), (8, 40, 1, 1), (8, 40, 0, 0), (8, 40, None, 2)],
)
def test_as_many_as_cores_jobs_and_memory_allow(begun, monkeypatch, cores, jobs, memory, processes) -> None:
    monkeypatch.setattr(ahead, "available_cores", lambda: cores)
    monkeypatch.setattr(ahead, "available_bytes", lambda: None if memory is None else memory << 30)
    with compiled_ahead(JOBS[:jobs]):
        assert len(begun) == processes


def test_each_begins_at_the_end_of_the_list_and_ends_with_the_work(begun, monkeypatch) -> None:
    monkeypatch.setattr(ahead, "available_cores", lambda: 3)
    with pytest.raises(KeyError), compiled_ahead(JOBS):
        raise KeyError
    first, second = (jobs for jobs, _ in begun)
    assert (first[0], second[0], first[1]) == (JOBS[-1], JOBS[-2], JOBS[-3])
    assert sorted((*first, *second), key=JOBS.index) == JOBS
    assert [process.said for _, process in begun] == [["killed", "waited for"]] * 2


def test_a_process_that_dies_at_once_is_not_missed(monkeypatch) -> None:
    monkeypatch.setattr(ahead, "available_cores", lambda: 2)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with compiled_ahead([(kernel, dtype, {"text": "x" * 100_000}, arch) for kernel, dtype, _, arch in JOBS]):
        pass


@pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")
def test_the_other_process_fills_the_cache_and_says_nothing_of_what_it_cannot_compile(tmp_path: Path) -> None:
    jobs = [("nothing", "fp16", {}, "sm_80"), ("hadamard_quantize", "fp16", {"block": 8}, "sm_80")]
    done = subprocess.run(
        [sys.executable, "-m", "hqc.kernels.ahead"],
        input=json.dumps(jobs),
        env={**os.environ, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("", "")
    assert len(list(tmp_path.rglob("*.cubin"))) == 1
