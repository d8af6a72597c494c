"""The pure parts: prompts, limits; and modules that do not need FastAPI to say that it is missing."""

import importlib
import sys

import pytest

from hqc.errors import RuntimeMissingError
from hqc.serving.errors import ServingError
from hqc.serving.limits import Limits
from hqc.serving.prompts import digits_in_prompt
from hqc.serving.server import build_server

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.mark.parametrize(("digit", "word"), list(enumerate(WORDS)))
def test_every_digit_as_figure_and_word(digit: int, word: str) -> None:
    for prompt in (f"{digit}", word, f"A handwritten {word.upper()}!", f"draw the digit {digit}, please"):
        assert digits_in_prompt(prompt) == [digit]


@pytest.mark.parametrize(
    ("prompt", "numbers"),
    [
        ("", []),
        ("a cat someone often weighs", []),  # one, ten and eight inside of words
        ("12", [None]),
        ("07", [None]),
        ("7.5", [7, 5]),
        ("seven and 7", [7, 7]),
        ("eighty seven", [None, 7]),
        ("one hundred", [1, None]),
        ("seventeen", [None]),
        ("٧", []),
    ],
)
def test_prompts_that_name_no_or_several_digits(prompt: str, numbers: list[int | None]) -> None:
    assert digits_in_prompt(prompt) == numbers


def test_limits_below_the_least_are_refused_together() -> None:
    with pytest.raises(ServingError, match="max_images=0, max_queue=-1"):
        Limits(max_images=0, max_queue=-1)
    assert Limits(max_queue=0).max_queue == 0


def test_missing_uvicorn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(RuntimeMissingError, match=r"pip install 'hqc\[serve\]'"):
        build_server(None)  # type: ignore[arg-type]


def test_missing_fastapi_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "hqc.serving.app", raising=False)
    with pytest.raises(
        RuntimeMissingError, match=r"^hqc serve: fastapi, uvicorn or prometheus-client is not installed\. pip"
    ):
        importlib.import_module("hqc.serving.app")
