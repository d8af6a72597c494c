"""A model of how long a product takes in a tile: what tiles are chosen by where nothing was measured.

Its constants are fitted to the products of LDM-4 on an H100, 72 shapes with their ten best tiles each: the tile that it
chooses takes 1 to 2 % longer in sum than the best that was tried.  On other cards it stands in for a measurement.
"""

from collections.abc import Iterator
from dataclasses import replace

from hqc.kernels.cards import Card
from hqc.kernels.products import Product, ProductTile

__all__ = ["deepest", "fits", "model_candidates", "model_nanoseconds", "shared_bytes", "tile_channels"]

_SPLITS = (1, 2, 3, 4, 6, 8)
_PLAIN = ((128, 128), (64, 128), (128, 64), (64, 64))
"""Rows and outputs. Four warps hold them, which is one warp group a `wgmma`; eight are 1.3 to 2 times slower there."""
_ROTATED = ((256, 64), (128, 128), (128, 64), (64, 128), (64, 64))
"""Rows share the work of a rotation; 64 sums a thread leave registers for it."""
_FEW_OUTPUTS = ((128, 32), (64, 32), (32, 32))
_FEW_ROWS = ((32, 32), (16, 32))
_UNALIGNED = ((64, 64), (64, 32), (32, 32), (16, 32))
_DEEP = ((64, 64), (32, 32), (16, 32))
"""For a tile of 256 channels, which only a rotation of 256 needs."""
_WARP_GROUP_MMA = 9
"""The generation of cards, the compute capability's first number, that has `wgmma`."""
_LARGE_STAGE = 24 * 1024
"""Bytes from which a stage is one of three; smaller ones are four."""
_STEPS_A_SPLIT = 4
"""Steps that a split has at least."""
_EXCHANGE = 16 * 1024
"""Bytes of shared memory that a rotation of 128 and more takes."""

_PRODUCTS = 17500
"""int8 multiply-adds a nanosecond of a multiprocessor."""
_BYTES = 220
"""Bytes a nanosecond into a multiprocessor."""
_WINDOW = 2
"""What a byte of codes costs in a convolution, whose addresses are computed and masked."""
_STEP = 60
"""Nanoseconds of a step beyond arithmetic and traffic."""
_LATENCY = (50, 100)
"""Nanoseconds of a step that only other programs hide, and those for every 64 channels."""
_EPILOGUE = 17.5
"""Bytes a nanosecond that a multiprocessor writes."""
_PROGRAM = 700
"""Nanoseconds of a program's begin and end."""
_LAUNCH = 1000
"""Nanoseconds of a kernel, and of the second one that splits need."""
_PARTIAL = 10000
"""Bytes of partial sums a nanosecond, of the whole card."""
_REGISTERS = 60
"""Of a thread, besides its sums."""
_SMALL = 3
"""How much slower the matrix instruction is below the 64 rows that `wgmma` takes."""
_RESIDENT = 8


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


def shared_bytes(product: Product, tile: ProductTile) -> int:
    """Shared memory of a launch, at most: codes and weights of every stage, and what a wide rotation exchanges."""
    stage = (tile.rows + tile.outputs * (1 + product.two_digits)) * tile.channels
    return stage * tile.num_stages + (_EXCHANGE if product.rotation >= 128 else 0)


def fits(
    product: Product,
    tile: ProductTile,
    card: Card,
    *,
    whole_rows: int = 0,
    unsplit: bool = False,
    crowded: bool = False,
) -> bool:
    """Whether a tile may compute a product on a card: shared memory, registers, rotation, channels, splits.

    whole_rows: rows of a sample, if the tile must lie in one.  unsplit: whether splits are out of the question.
    crowded: whether the epilogue holds a second tile, a residual: eight warps with it take more than half of the
    registers, and no second program finds room (8×64×64, 192 to 192: 54 us instead of 39).
    """
    widest = tile_channels(product.channels, product.rotation)
    return (
        shared_bytes(product, tile) <= card.shared_bytes
        and _in_registers(product, tile)
        and tile.channels % product.rotation == 0
        and (tile.channels <= widest or (product.channels % 16 == 0 and product.channels % tile.channels == 0))
        and (tile.splits == 1 or (tile.splits <= product.steps(tile) and not unsplit))
        and (not whole_rows or whole_rows % tile.rows == 0)
        and not (crowded and tile.splits == 1 and tile.num_warps > 4)
    )


def _in_registers(product: Product, tile: ProductTile) -> bool:
    """What the assembler holds without spilling: sums of a thread, and the weights that it rotates or reads twice."""
    sums = tile.rows * tile.outputs * (1 + product.two_digits) // (32 * tile.num_warps)
    if product.rotation > 1:
        return sums <= 64 and tile.outputs * tile.channels <= 2048 * tile.num_warps
    return sums <= 128 and not (product.two_digits and sums > 64 and tile.channels > 64)


def model_candidates(product: Product, card: Card) -> Iterator[ProductTile]:
    """The tiles among which the model chooses, those that fit a multiprocessor; smaller ones come last.

    They have three stages if there is a tile that can have them, else two: the model does not know what fewer cost.
    """
    tiles = list(_whole_tiles(product, card))
    least = min(3, max((tile.num_stages for tile in tiles), default=1))
    for tile in (tile for tile in tiles if tile.num_stages >= least):
        for splits in _SPLITS:
            if splits == 1 or _STEPS_A_SPLIT * splits <= product.steps(tile):
                yield replace(tile, splits=splits)


def _whole_tiles(product: Product, card: Card) -> Iterator[ProductTile]:
    for depth in _depths(product):
        for rows, outputs in _shapes(product, depth):
            warps = _warps(product, rows * outputs, depth, card)
            stage = (rows + outputs * (1 + product.two_digits)) * depth
            stages = 2 if depth > 128 else 3 if stage >= _LARGE_STAGE else 4
            tile = deepest(product, ProductTile(rows, outputs, depth, warps, stages), card)
            if tile is not None:
                yield tile


def deepest(product: Product, tile: ProductTile, card: Card) -> ProductTile | None:
    """The tile with as many of its stages as the card has room for."""
    tiles = (replace(tile, num_stages=stages) for stages in range(tile.num_stages, 0, -1))
    return next((tile for tile in tiles if fits(product, tile, card)), None)


def _warps(product: Product, sums: int, depth: int, card: Card) -> int:
    """Four, or eight where four would spill."""
    if depth > 128:
        return 8 if sums >= 64 * 64 else 4
    if product.rotation > 1 or card.capability[0] != _WARP_GROUP_MMA:
        return 8 if sums >= 128 * 128 else 4
    return 4


def model_nanoseconds(product: Product, tile: ProductTile, card: Card) -> float:
    """How long the model thinks that a product takes, the sum over its splits included.

    The programs of the busiest multiprocessor run as many at a time as its shared memory and registers hold. A step of
    theirs takes the time of its arithmetic and traffic; what latency adds to that, other programs hide.
    """
    rows, outputs, depth, splits, digits = tile.rows, tile.outputs, tile.channels, tile.splits, 1 + product.two_digits
    steps = -(-product.steps(tile) // splits)
    programs = -(-product.rows // rows) * -(-product.outputs // outputs) * splits
    busiest = -(-programs // card.multiprocessors)
    at_once = _resident(product, tile, card)
    # A rotated tile of weights is a product with the block of ±1 first, and four bits are taken apart.
    computed = rows + (product.rotation + 32 if product.rotation > 1 else 0)
    rate = _PRODUCTS if rows >= 64 else _PRODUCTS / _SMALL
    codes = rows * (_WINDOW if product.taps > 1 else 1)
    step = _STEP + computed * outputs * depth * digits / rate + (codes + outputs * digits) * depth / _BYTES
    alone = step + _LATENCY[0] + _LATENCY[1] * depth / 64
    rounds, rest = divmod(busiest, at_once)
    running = rounds * max(at_once * step, alone) + (max(rest * step, alone) if rest else 0)
    written = busiest * (2 if splits == 1 else 4) * rows * outputs / _EPILOGUE
    ending = written + (rounds + (rest > 0)) * _PROGRAM + _LAUNCH
    joining = 0.0 if splits == 1 else _LAUNCH + (4 * splits + 2) * product.rows * product.outputs / _PARTIAL
    return steps * running + ending + joining


def _resident(product: Product, tile: ProductTile, card: Card) -> int:
    """Programs that a multiprocessor holds at a time."""
    threads = 32 * tile.num_warps
    registers = min(255, tile.rows * tile.outputs * (1 + product.two_digits) // threads + _REGISTERS)
    by_memory = card.shared_bytes // (shared_bytes(product, tile) + 1024)
    return max(1, min(by_memory, 65536 // (registers * threads), _RESIDENT))


def _depths(product: Product) -> tuple[int, ...]:
    widest = tile_channels(product.channels, product.rotation)
    return (widest, 64) if widest == 128 and product.rotation <= 64 else (widest,)


def _shapes(product: Product, depth: int) -> tuple[tuple[int, int], ...]:
    if depth > 128:
        return _DEEP
    if product.channels % 16:
        return _UNALIGNED
    few = _FEW_ROWS if product.rows <= 32 else ()
    usual = _ROTATED if product.rotation > 1 else _PLAIN
    return (*usual, *few, *(_FEW_OUTPUTS if product.outputs <= 32 else ()))
