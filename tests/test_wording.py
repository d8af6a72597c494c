"""Words of others as parts of a line."""

import doctest
import importlib

import pytest

from hqc.wording import first_words, listed, printable, shortened


def test_the_examples() -> None:
    assert doctest.testmod(importlib.import_module("hqc.wording")).failed == 0


def test_what_steers_a_terminal_is_replaced() -> None:
    assert printable("a\n  b\t\x1b[31mred\x1b[0m") == "a b \ufffd[31mred\ufffd[0m"


def test_a_text_is_cut_at_its_length() -> None:
    assert shortened("abcdef", 6) == "abcdef"
    assert shortened("abc def", 5) == "abc…"
    assert shortened("abcdef", 0) == "…"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [(ValueError("a\n b"), "a b"), (ValueError(), "ValueError"), (ValueError("x" * 500), "x" * 149 + "…")],
)
def test_an_error_in_part_of_a_line(error: Exception, wanted: str) -> None:
    assert first_words(error) == wanted


def test_the_rest_of_a_list_is_counted() -> None:
    assert listed(["a", "b"]) == "a, b"
    assert listed(list("abcde")) == "a, b, c … (2 more)"
