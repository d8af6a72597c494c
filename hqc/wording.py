"""Words of files and of other libraries as parts of a line: printable, short, and what was left out is counted."""

from collections.abc import Sequence

__all__ = ["first_words", "listed", "printable", "shortened"]


def printable(text: str) -> str:
    """On one line, without characters that steer a terminal: a file may hold any."""
    return "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))


def shortened(text: str, longest: int) -> str:
    """The text, or as much of it as there is room for and "…"."""
    return text if len(text) <= longest else f"{text[: max(0, longest - 1)].rstrip()}…"


def first_words(error: BaseException, longest: int = 150) -> str:
    """Another library's error in part of a line; its class where it says nothing."""
    return shortened(printable(str(error)), longest) or type(error).__name__


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first of some names in part of a line, and how many more there are.

    >>> listed(["a", "b", "c"], 2)
    'a, b … (1 more)'
    """
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} … ({len(names) - most} more)"
