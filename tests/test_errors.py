"""One tree of errors, each with where, found and do."""

import pytest

from hqc import errors
from hqc.errors import HqcError


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n != "HqcError"])
def test_every_error_is_an_hqc_error_with_its_parts(name: str) -> None:
    kind = getattr(errors, name)
    error = kind("to_q", "has 12 channels; expected 32", "Use another block.")
    assert isinstance(error, HqcError)
    assert (error.where, error.found, error.do) == ("to_q", "has 12 channels; expected 32", "Use another block.")
    assert str(error) == "to_q: has 12 channels; expected 32. Use another block."


def test_no_second_full_stop() -> None:
    assert str(HqcError("a", "b.", "C.")) == "a: b. C."


def test_the_tree_is_complete() -> None:
    kinds = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, HqcError)}
    assert kinds == set(errors.__all__)
