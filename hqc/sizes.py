"""Sizes of latents: one side of a square, or height and width."""

from collections.abc import Sequence

__all__ = ["LatentSize", "as_size", "sides", "size_text"]

LatentSize = int | tuple[int, int]
"""What `--latent-size` takes: 64, or (64, 96) for a height of 64 and a width of 96."""

LARGEST_SIDE = 4096


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width.

    >>> sides(64), sides([64, 96])
    ((64, 64), (64, 96))
    """
    if isinstance(size, int):
        return size, size
    height, width = size
    return int(height), int(width)


def as_size(value: object) -> LatentSize:
    """A side, (height, width), or the text of either, in its shortest form.

    >>> as_size("64x96"), as_size((64, 64)), as_size("12")
    ((64, 96), 64, 12)

    Raises:
        ValueError: for anything else, or a side that is not in 2…4096.
    """
    parts: list[object] = list(value) if isinstance(value, (tuple, list)) else [value]
    if isinstance(value, str):
        parts = [
            int(part) for part in value.lower().replace("×", "x").split("x") if part.isascii() and part.isdecimal()
        ]
        if len(parts) != 1 + value.lower().count("x") + value.count("×"):
            parts = []
    if len(parts) not in (1, 2) or not all(type(part) is int and 2 <= part <= LARGEST_SIDE for part in parts):
        raise ValueError(
            f"{value!r}; expected a side such as 64, or height and width such as 64x96, of 2 to {LARGEST_SIDE}"
        )
    height, width = parts[0], parts[-1]
    assert isinstance(height, int)
    assert isinstance(width, int)
    return height if height == width else (height, width)


def size_text(size: LatentSize) -> str:
    """As the command line takes it.

    >>> size_text(64), size_text((64, 96))
    ('64', '64x96')
    """
    return str(size) if isinstance(size, int) else "x".join(map(str, size))
