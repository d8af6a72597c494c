"""Tile sizes by shape: large tiles where there are enough of them to fill the processor, small ones where not."""

from collections.abc import Sequence

from hqc.kernels.cards import H100, Card
from hqc.kernels.products import ProductTile

__all__ = ["ProductTile", "hadamard_nchw_tile", "hadamard_rows_tile", "product_tile", "tile_channels"]

_HADAMARD_ELEMENTS = 4096
"""Of a tile: 32 a thread, which four warps hold in registers with room for several programs a multiprocessor."""


# (rows, outputs, warps) from the largest on: 64 sums a thread in the first ones, fewer in the last.
_SHAPES = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (64, 32, 4), (32, 32, 4), (16, 32, 4))
# Two digits keep twice as many sums; a deep rotation keeps its matrix and an int32 tile as well.
_CROWDED_SHAPES = ((128, 64, 8), *_SHAPES[2:])
# A tile of 256 channels, which only a rotation of 256 needs, leaves shared memory for this much.
_DEEP_SHAPES = ((64, 64, 8), (32, 32, 4), (16, 32, 4))


def _power_of_two(value: int) -> int:
    """The smallest power of two that is not below value.

    >>> _power_of_two(1), _power_of_two(48), _power_of_two(64)
    (1, 64, 64)
    """
    return 1 << (value - 1).bit_length()


def hadamard_rows_tile(
    rows: int, channels: int, block: int, *, multiprocessors: int = H100.multiprocessors
) -> tuple[int, int, int]:
    """(rows, channels, warps) of a tile for `hadamard_quantize` over rows of channels.

    Channels: a power of two that divides them if one of 64…256 does, so that no lane is masked; at least a block.
    Rows: the rest of the tile, halved while there are fewer than four tiles a multiprocessor.

    >>> hadamard_rows_tile(8192, 320, 32)
    (64, 64, 4)
    """
    wide = next((width for width in (256, 128, 64) if channels % width == 0), min(64, _power_of_two(channels)))
    wide = max(wide, block, 16)
    tall = max(1, min(_HADAMARD_ELEMENTS // wide, _power_of_two(rows)))
    columns = -(-channels // wide)
    while tall > 8 and -(-rows // tall) * columns < 4 * multiprocessors:
        tall //= 2
    return tall, wide, max(1, min(4, tall * wide * 4 // _HADAMARD_ELEMENTS))


def hadamard_nchw_tile(pixels: int, block: int) -> tuple[int, int, int]:
    """(pixels, channels, warps) of a tile for `hadamard_quantize` from NCHW.

    One warp, so that the butterfly over channels stays among its lanes and registers; 64 or 128 elements a thread.

    >>> hadamard_nchw_tile(4096, 32), hadamard_nchw_tile(4096, 128), hadamard_nchw_tile(9, 32)
    ((64, 32, 1), (32, 128, 1), (16, 32, 1))
    """
    wide = max(32, block)
    return min((2048 if wide <= 64 else 4096) // wide, _power_of_two(pixels)), wide, 1


def tile_channels(channels: int, rotation: int = 1) -> int:
    """Channels of a product's tile: the widest of 128 and 64 that divides them, else 64, or 32 where that is enough.

    Channels that are no multiple of 16 are read byte by byte, each with an address of its own: 32 of them at most.

    >>> [tile_channels(c) for c in (4, 45, 48, 192, 320, 960, 1280)]
    [32, 32, 64, 64, 64, 64, 128]
    """
    if channels % 16:
        return max(32, rotation)
    widest = next((width for width in (128, 64) if channels % width == 0), 64 if channels > 32 else 32)
    return max(widest, rotation)


def product_tile(
    rows: int,
    outputs: int,
    channels: int,
    *,
    taps: int = 1,
    rotation: int = 1,
    two_digits: bool = False,
    card: Card = H100,
    whole_rows: int = 0,
    unsplit: bool = False,
) -> ProductTile:
    """The tile and the number of splits for which `_nanoseconds` is least, among those that fit a multiprocessor.

    Shared memory: (rows + outputs)·channels bytes a stage within the 99 KiB that every architecture from sm_80 on has.
    """
    depth = tile_channels(channels, rotation)
    shapes = _shapes(depth, aligned=channels % 16 == 0, crowded=two_digits or rotation >= 64)
    steps = taps * -(-channels // depth)
    choices = [
        (shape, splits)
        for splits in _SPLITS
        if splits == 1 or (4 * splits <= steps and not unsplit)
        for shape in shapes
    ]
    choices = [c for c in choices if not whole_rows or whole_rows % c[0][0] == 0] or choices

    def cost(choice: tuple[tuple[int, int, int], int]) -> tuple[float, int]:
        shape, splits = choice  # of equals the smaller tile, which leaves room for other programs
        return _nanoseconds(rows, outputs, depth, steps, shape[:2], splits, card.multiprocessors), shape[0] * shape[1]

    (tall, wide, warps), splits = min(choices, key=cost)
    return ProductTile(tall, wide, depth, warps, {32: 4, 64: 4, 128: 3}.get(depth, 2), splits)


_SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)
_PRODUCTS = 4000
"""int8 multiply-adds a nanosecond of a multiprocessor: about half of what the data sheet of an H100 says."""
_BYTES = 64
"""Bytes a nanosecond from the second-level cache to a multiprocessor."""
_STEP = 180
"""Nanoseconds that a step of a tile takes at least: latency that the stages do not hide."""
_LAUNCH = 2500
"""Nanoseconds of the second kernel that splits need."""
_PARTIAL = 2000
"""Bytes of partial sums a nanosecond, of the whole card."""


def _nanoseconds(
    rows: int, outputs: int, depth: int, steps: int, shape: tuple[int, int], splits: int, multiprocessors: int
) -> float:
    """A rough model: arithmetic and traffic of the busiest multiprocessor, or the latency of a program's steps.

    Its constants are read from data sheets, not measured.
    """
    tall, wide = shape
    length = -(-steps // splits)
    programs = -(-rows // tall) * -(-outputs // wide) * splits
    busiest = -(-programs // multiprocessors) * length
    step = max(tall * wide * depth / _PRODUCTS, (tall + wide) * depth / _BYTES)
    joining = 0.0 if splits == 1 else _LAUNCH + 8 * splits * rows * outputs / _PARTIAL
    return max(busiest * step, length * _STEP) + joining


def _shapes(depth: int, *, aligned: bool, crowded: bool) -> Sequence[tuple[int, int, int]]:
    if depth > 128:
        return _DEEP_SHAPES
    if not aligned:
        return _SHAPES[2:]
    return _CROWDED_SHAPES if crowded else _SHAPES
