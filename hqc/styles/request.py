"""What `--lora` and `--lora-scale` are given: `[NAME=]FILE[:SCALE]` and `NAME=SCALE`."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hqc.errors import OptionError

__all__ = ["LoraRequest", "parse_lora", "parse_loras", "parse_scales"]

_LONGEST_NAME = 60
_FORM = "Write FILE.safetensors, FILE.safetensors:0.8 or NAME=FILE.safetensors:0.8."


@dataclass(frozen=True)
class LoraRequest:
    """A LoRA as it is asked for: its file, its scale, and the name that its input has."""

    file: str
    scale: float
    name: str


def parse_lora(text: str) -> LoraRequest:
    """Reads `[NAME=]FILE[:SCALE]`; without a name it is the file's, without a scale that is 1.

    >>> parse_lora("styles/pixel-art.safetensors:0.8")
    LoraRequest(file='styles/pixel-art.safetensors', scale=0.8, name='pixel_art')

    Raises:
        OptionError: for a scale or a name that is none.
    """
    before, sign, file = text.partition("=")
    named = bool(sign) and re.fullmatch(r"\w+", before) is not None and not Path(text).exists()
    name, file = (before, file) if named else ("", text)
    scale = 1.0
    if not Path(file).exists() and ":" in file:
        file, _, given = file.rpartition(":")
        scale = _number(f"--lora {text}", given)
    if not file:
        raise OptionError(f"--lora {text}", "names no file", _FORM)
    return LoraRequest(file, scale, _checked(text, name or re.sub(r"\W", "_", Path(file).stem)))


def _checked(text: str, name: str) -> str:
    if not re.fullmatch(r"\w+", name, re.ASCII) or len(name) > _LONGEST_NAME:
        found = f"would be called {name[:_LONGEST_NAME]!r}; a name has at most {_LONGEST_NAME} letters, digits and _"
        raise OptionError(f"--lora {text}", found, "Give one: NAME=FILE.")
    return name


def _number(where: str, given: str) -> float:
    try:
        number = float(given)
    except ValueError as error:
        raise OptionError(where, f"has the scale {given!r}, which is no number", _FORM) from error
    if not math.isfinite(number):
        raise OptionError(where, f"has the scale {given}; expected a finite number", _FORM)
    return number


def parse_loras(texts: Sequence[str]) -> tuple[LoraRequest, ...]:
    """`parse_lora` of each.

    Raises:
        OptionError: for the first that is none, or a name that two have.
    """
    found = tuple(map(parse_lora, texts))
    names = [one.name for one in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise OptionError("--lora", f"two are called {twice[0]}", "Name one of them otherwise: NAME=FILE.")
    return found


def parse_scales(texts: Sequence[str]) -> dict[str, float]:
    """Reads `NAME=SCALE` of each.

    >>> parse_scales(["pixel_art=0.8"])
    {'pixel_art': 0.8}

    Raises:
        OptionError: for one that is none, or a name that is given twice.
    """
    scales: dict[str, float] = {}
    for text in texts:
        name, sign, given = text.partition("=")
        if not sign or not name:
            raise OptionError(f"--lora-scale {text}", "is no NAME=SCALE", "Write for example pixel_art=0.8.")
        if name in scales:
            raise OptionError("--lora-scale", f"gives {name} twice", "Give it once.")
        scales[name] = _number(f"--lora-scale {text}", given)
    return scales
