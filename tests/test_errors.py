"""One tree of errors, each with where, found and do."""

import pytest

from hqc import errors
from hqc.errors import LONGEST_LINE, LONGEST_LIST, HqcError


@pytest.mark.parametrize("name", [n for n in errors.__all__ if n.endswith("Error") and n != "HqcError"])
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
    assert kinds == {name for name in errors.__all__ if name.endswith("Error")}


# ---- the line ------------------------------------------------------------------------------------------------------


def test_a_short_message_is_the_line() -> None:
    error = HqcError("to_q", "has 12 channels; expected 32", "Use another block.")
    assert error.line == str(error)


def test_a_line_is_one_and_cannot_steer_a_terminal() -> None:
    assert HqcError("a\nb", "is\t\x1b[2J bad\n\n", "Do.").line == "a b: is \ufffd[2J bad. Do."


@pytest.mark.parametrize("lengths", [(20, 2000, 60), (2000, 20, 60), (20, 20, 2000), (900, 900, 900), (5, 400, 5)])
@pytest.mark.parametrize("lists", [False, True])
def test_a_long_message_is_cut_and_every_part_is_in_it(lengths: tuple[int, int, int], lists: bool) -> None:
    where, found, do = (letter * length for letter, length in zip("wfd", lengths, strict=True))
    line = HqcError(where, found, do, lists=lists).line
    assert len(line) <= (LONGEST_LIST if lists else LONGEST_LINE)
    assert "…" in line or sum(lengths) < LONGEST_LIST
    for letter, length in zip("wfd", lengths, strict=True):
        assert line.count(letter) >= min(length, 70)


def test_what_to_do_stays_whole_and_the_end_of_a_path_stays() -> None:
    line = HqcError("/tmp/" + "long/" * 100 + "model.hqc", "is broken: " + "x" * 500, "Write it again.").line
    assert "/model.hqc: is broken: xxx" in line
    assert line.startswith("…")
    assert line.endswith("xxx… Write it again.")
