"""Which digit a prompt asks for."""

import re

__all__ = ["digits_in_prompt"]

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OTHER_NUMBERS = (
    "ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|"
    "twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|thousand|million"
)
NUMBER = re.compile(rf"[0-9]+|\b(?:{'|'.join(DIGIT_WORDS)}|{OTHER_NUMBERS})\b", re.IGNORECASE)


def digits_in_prompt(prompt: str) -> list[int | None]:
    """Every number that a prompt mentions, in order: 0…9, or None for a number that is no single digit.

    >>> digits_in_prompt("a handwritten 7"), digits_in_prompt("Seven"), digits_in_prompt("eighty-seven or 12")
    ([7], [7], [None, 7, None])
    """
    return [_value(word.lower()) for word in NUMBER.findall(prompt)]


def _value(word: str) -> int | None:
    if word in DIGIT_WORDS:
        return DIGIT_WORDS.index(word)
    return int(word) if len(word) == 1 else None
