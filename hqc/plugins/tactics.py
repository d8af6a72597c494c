"""Which kernels a variant may run: the tactics among which TensorRT picks the fastest on the card.

Large tiles move fewer bytes, small ones fill the card at small batches; which is faster depends on both, and TensorRT
measures it for the profile's usual batch. So every variant has two or three, and no rule picks one. Those of products
are the tiles that `hqc.kernels.tiles` has for a large, a middle and a small batch within a plugin's shared memory.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from hqc.kernels.cards import H100
from hqc.kernels.options import ConvOptions, GemmOptions, HadamardOptions, KernelOptions
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import deepest
from hqc.kernels.tiles import product_tile
from hqc.plugins.hqc_qdp.nodes import ConvVariant, HadamardVariant, LinearVariant, Variant

__all__ = ["Tactic", "tactics"]

_BATCHES = (32, 8, 1)
"""Samples for which a product's tile is chosen: one batch's tile is a tactic, the large one's the first."""
_CARD = replace(H100, shared_bytes=48 * 1024)
"""What tiles are chosen for: shared memory that every launch has; kernels are compiled for older cards as well."""
_OTHERS = (ProductTile(64, 64, 64, 4, 3), ProductTile(128, 64, 64, 4, 3))
"""One of them is the second tactic where every batch has the same tile."""
_IDLE = ProductTile(32, 32, 64, 4, 3)
"""For a batch of one whose larger tiles leave multiprocessors idle."""
_MOST = 3
_WIDTH = 64
"""Channels of a tile, where a block of H is not wider: whole lines of memory at two bytes a value."""
_ELEMENTS = 4096
"""Of a rotation's tile of rows, 32 a thread; from NCHW half of it, 64 a thread, unless a block of H needs more."""


@dataclass(frozen=True)
class Tactic:
    """One kernel: its name in `hqc.kernels`, the type it is compiled for, its options, its tile of the output."""

    kernel: str
    dtype: str
    options: KernelOptions

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns of the output that a program computes."""
        options = self.options
        if isinstance(options, HadamardOptions):
            return options.tile_rows, options.tile_channels
        assert isinstance(options, GemmOptions), "no other kernel is a tactic"
        return options.tile_rows, options.tile_outputs

    def plain_options(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self.options)


def tactics(variant: Variant, places: Sequence[int]) -> tuple[Tactic, ...]:
    """The kernels of a variant, the one for large batches first.

    places: pixels, or rows, that a sample has in each of the nodes that share the variant.
    """
    if isinstance(variant, HadamardVariant):
        found = _hadamard(variant, places)
    elif isinstance(variant, ConvVariant):
        sizes = {"kernel": variant.kernel, "stride": variant.stride, "padding": variant.padding}
        window: dict[str, Any] = {name: (size, size) for name, size in sizes.items()}
        found = [Tactic("int_conv2d", variant.dtype, ConvOptions(**p, **window)) for p in _products(variant, places)]
    elif isinstance(variant, LinearVariant):
        found = [Tactic("int_gemm", variant.dtype, GemmOptions(**p)) for p in _products(variant, places)]
    else:
        raise TypeError(f"no kernels for {type(variant).__name__}")
    return tuple(dict.fromkeys(found))


def _hadamard(variant: HadamardVariant, places: Sequence[int]) -> list[Tactic]:
    wide = max(min(_WIDTH, 1 << (variant.channels - 1).bit_length()), variant.block, 16)
    nchw = variant.layout == "nchw"
    aligned = variant.channels % 16 == 0 and (not nchw or all(count % 16 == 0 for count in places))
    if nchw:  # one warp, as in `hadamard_nchw_tile`: a butterfly across warps goes through shared memory
        heights, per_warp = (max(16, min(_ELEMENTS // 2 // wide, 64)), 16), _ELEMENTS
    else:
        tall = max(1, _ELEMENTS // wide)
        heights, per_warp = (tall, min(tall, 8)), 1024
    return [
        Tactic(
            "hadamard_quantize",
            variant.dtype,
            HadamardOptions(
                block=variant.block,
                regular=variant.regular,
                low=variant.low,
                high=variant.high,
                layout="nchw" if nchw else "rows",
                aligned=aligned,
                tile_rows=height,
                tile_channels=wide,
                num_warps=max(1, min(4, height * wide // per_warp)),
            ),
        )
        for height in heights
    ]


def _products(variant: LinearVariant | ConvVariant, places: Sequence[int]) -> list[dict[str, Any]]:
    form = "words" if variant.channels % 8 == 0 else "nibbles"
    return [
        {
            "form": form,
            "rotation": variant.block,
            "regular_rotation": variant.regular,
            "even": form == "words" and variant.channels % tile.channels == 0,
            "aligned": variant.channels % 16 == 0 and variant.outputs % 16 == 0,
            "tile_rows": tile.rows,
            "tile_outputs": tile.outputs,
            "tile_channels": tile.channels,
            "num_warps": tile.num_warps,
            "num_stages": tile.num_stages,
        }
        for tile in _tiles(variant, max(places, default=1))
    ]


def _tiles(variant: LinearVariant | ConvVariant, places: int) -> list[ProductTile]:
    """Without splits: the epilogue is the kernel's own."""
    taps, stride = (variant.kernel**2, variant.stride) if isinstance(variant, ConvVariant) else (1, 1)
    rows = -(-places // stride**2)
    form: dict[str, Any] = {"taps": taps, "rotation": variant.block, "card": _CARD, "unsplit": True}
    found = [product_tile(rows * batch, variant.outputs, variant.channels, **form) for batch in _BATCHES]
    smallest = found[-1]
    idle = -(-rows // smallest.rows) * -(-variant.outputs // smallest.outputs) < _CARD.multiprocessors
    product = Product(rows, variant.outputs, variant.channels, taps, variant.block)
    depth = max(min(smallest.channels, _WIDTH), variant.block)
    for tile in (*((_IDLE,) if idle else ()), *_OTHERS):
        fitting = deepest(product, replace(tile, channels=depth), _CARD)
        if fitting is not None and (tile is _IDLE or len({_sizes(t) for t in found}) < 2):
            found.append(fitting)
    different = {_sizes(tile): tile for tile in reversed(found)}
    return list(reversed(different.values()))[:_MOST]


def _sizes(tile: ProductTile) -> tuple[int, int, int]:
    return tile.rows, tile.outputs, tile.channels
