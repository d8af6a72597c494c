"""What lanes are made of: shares of images, parts of rows, and how many lanes and threads a machine has."""

import logging
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hqc.errors import OptionError
from hqc.serving import opening
from hqc.serving.lanes import shares
from hqc.serving.rendezvous import apart
from hqc.serving.split import Split, parts_of


@given(rows=st.integers(1, 40), count=st.integers(1, 9))
def test_parts_are_all_rows_once_in_their_order(rows: int, count: int) -> None:
    parts = parts_of(rows, count)
    assert [row for part in parts for row in range(rows)[part]] == list(range(rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(sizes) == min(rows, count)
    assert 0 <= max(sizes) - min(sizes) <= 1


@given(ready=st.integers(0, 20), others=st.integers(0, 20), free=st.integers(0, 4), busy=st.integers(0, 4))
def test_shares_are_the_first_that_are_ready_evenly(ready: int, others: int, free: int, busy: int) -> None:
    found = shares(range(ready), ready + others, free, max(1, free + busy))
    given_ = [item for share in found for item in share]
    assert given_ == list(range(ready))[: len(given_)]
    assert len(found) <= free
    assert all(0 < len(share) <= -(-(ready + others) // max(1, free + busy)) for share in found)
    if free and ready:
        assert found


@pytest.mark.parametrize("at_once", [1, 2, 3, 9])
def test_parts_of_a_call_are_the_call(at_once: int) -> None:
    seen: list[int] = []

    def run(x: Any, ids: Any) -> Any:
        seen.append(len(x))
        assert len(ids) == 2
        return 2 * x + ids.sum()

    x, ids = np.arange(10.0).reshape(5, 2), np.ones(2)
    found = np.concatenate(Split()(run, {"x": x, "ids": ids}, {"x"}, 5, at_once))
    np.testing.assert_array_equal(found, 2 * x + 2)
    assert sorted(seen) == sorted(part.stop - part.start for part in parts_of(5, at_once))


def test_a_part_that_fails_fails_the_call() -> None:
    def run(x: Any) -> Any:
        if x[0] == 3:
            raise FloatingPointError
        return x

    with pytest.raises(FloatingPointError):
        Split()(run, {"x": np.arange(5)}, {"x"}, 5, 2)


def test_what_is_done_apart_is_done_at_once_outside_of_an_image() -> None:
    assert apart(lambda x, *, y: x - y)(5, y=3) == 2


@pytest.mark.parametrize(
    ("runtime", "cores", "asked", "found"),
    [
        ("onnxruntime", 2, (None, None), (2, 1)),
        ("onnxruntime", 16, (None, None), (2, 15)),
        ("onnxruntime", 1, (None, None), (1, None)),
        ("onnxruntime", 8, (None, 3), (1, 3)),
        ("onnxruntime", 8, (4, None), (4, 5)),
        ("onnxruntime", 2, (4, None), (4, 1)),
        ("onnxruntime", 8, (2, 2), (2, 2)),
        ("torch", 8, (None, None), (1, None)),
        ("torch", 8, (1, 4), (1, 4)),
    ],
)
def test_lanes_and_threads(runtime: str, cores: int, asked: Any, found: Any) -> None:
    assert opening.divided(runtime, *asked, cores=cores) == found


def test_lanes_of_a_runtime_that_takes_one_call_at_a_time() -> None:
    with pytest.raises(OptionError, match="--lanes 2: runtime torch-cuda takes one call at a time"):
        opening.divided("torch-cuda", 2)


def test_cores_of_a_model_that_takes_one_call_at_a_time() -> None:
    assert opening.opened("digits", cores=2).lanes == 1


def test_one_timestep_a_call_is_said(caplog: pytest.LogCaptureFixture, tmp_path: Any) -> None:
    import hqc

    few = {"calibrate_activations.samples": 2, "sampler.num_inference_steps": 2}
    program = hqc.ptq(hqc.trace("digits"), "rtn", "w4a4", settings=few)
    hqc.export_program(program, "onnxruntime", tmp_path / "one", one_timestep=True)
    with caplog.at_level(logging.WARNING, "hqc"):
        opening.opened(str(tmp_path / "one"), threads=1)
    assert "takes one timestep a call: images at different steps share none. Export it without" in caplog.text
