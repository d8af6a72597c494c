"""The description of a GPU: right where it can be found out, null where it cannot, and never a failure."""

import ctypes
import json
import subprocess
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hqc.evaluation.bench import machine
from hqc.evaluation.bench.machine import describe_gpu, describe_machine, machine_line

FIELDS = {
    "gpu": "Some Card",
    "compute_capability": "9.0",
    "multiprocessors": 132,
    "gpu_memory_bytes": 80 * 10**9,
    "l2_cache_bytes": 50 * 2**20,
    "cuda": "13.0",
    "driver": "580.65.06",
    "driver_cuda": "13.0",
    "cudnn": 91002,
}


def properties() -> SimpleNamespace:
    sizes = {"multi_processor_count": 132, "total_memory": 80 * 10**9, "L2_cache_size": 50 * 2**20}
    return SimpleNamespace(name="Some Card", major=9, minor=0, **sizes)


def answers(text: str, code: int = 0) -> Any:
    return lambda command, **_: SimpleNamespace(returncode=code, stdout=text)


class Library:
    """libcuda, as far as it is asked."""

    def __init__(self, code: int = 0) -> None:
        self._code = code

    def cuDriverGetVersion(self, number: Any) -> int:
        number._obj.value = 13000
        return self._code


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties())
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91002)
    monkeypatch.setattr(machine.subprocess, "run", answers("580.65.06\n"))
    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Library())
    return monkeypatch


def test_everything_is_found(card: pytest.MonkeyPatch) -> None:
    assert describe_gpu() == FIELDS
    assert json.loads(json.dumps(describe_gpu())) == FIELDS


def broken(*_: Any, **__: Any) -> Any:
    raise AttributeError("module has no such function")


@pytest.mark.parametrize(
    ("where", "name", "value", "missing"),
    [
        (torch.backends.cudnn, "version", broken, ["cudnn"]),
        (torch.version, "cuda", None, ["cuda"]),
        (machine.ctypes, "CDLL", broken, ["driver_cuda"]),
        (machine.ctypes, "CDLL", lambda name: Library(3), ["driver_cuda"]),
        (machine.subprocess, "run", broken, ["driver"]),
        (machine.subprocess, "run", answers("", 9), ["driver"]),
        (machine.subprocess, "run", answers("\n"), ["driver"]),
        (torch.cuda, "get_device_properties", broken, list(FIELDS)[:5]),
    ],
)
def test_a_missing_fact_is_null(
    card: pytest.MonkeyPatch, where: Any, name: str, value: Any, missing: list[str]
) -> None:
    card.setattr(where, name, value)
    assert describe_gpu() == FIELDS | dict.fromkeys(missing)


@pytest.mark.parametrize("lacking", ["name", "major", "multi_processor_count", "total_memory", "L2_cache_size"])
def test_a_property_that_torch_lacks_is_null(card: pytest.MonkeyPatch, lacking: str) -> None:
    def lacks(device: int) -> SimpleNamespace:
        found = properties()
        delattr(found, lacking)
        return found

    card.setattr(torch.cuda, "get_device_properties", lacks)
    found = describe_gpu()
    assert sum(value is None for value in found.values()) == 1
    assert list(found) == list(FIELDS)


def test_a_driver_that_does_not_answer_costs_seconds(card: pytest.MonkeyPatch) -> None:
    def hangs(command: list[str], *, timeout: float, **_: Any) -> Any:
        assert timeout <= 10
        raise subprocess.TimeoutExpired(command, timeout)

    card.setattr(machine.subprocess, "run", hangs)
    assert describe_gpu() == FIELDS | {"driver": None}


def test_with_nothing_at_all_there_are_nulls_and_a_line(card: pytest.MonkeyPatch) -> None:
    for where, name in (
        (torch.cuda, "current_device"),
        (torch.backends.cudnn, "version"),
        (machine.subprocess, "run"),
        (ctypes, "CDLL"),
    ):
        card.setattr(where, name, broken)
    card.setattr(torch.version, "cuda", None)
    assert describe_gpu() == dict.fromkeys(FIELDS)
    assert machine_line(describe_machine() | describe_gpu()).startswith("a GPU, CUDA unknown; ")
