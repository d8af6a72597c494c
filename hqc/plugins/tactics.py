"""Which kernels a variant may run: the tactics among which TensorRT picks the fastest on the card.

Large tiles move fewer bytes, small ones fill the card at small batches; which is faster depends on both, and TensorRT
measures it for the profile's usual batch. So every variant has two or three, and no rule picks one. Tiles depend on the
channels as little as they can: the fewer kernels, the shorter the export.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from hqc.kernels.options import ConvOptions, GemmOptions, HadamardOptions, KernelOptions
from hqc.kernels.tiles import tile_channels
from hqc.plugins.hqc_qdp.nodes import ConvVariant, HadamardVariant, LinearVariant, Variant

__all__ = ["Tactic", "tactics"]

_TILES = ((128, 128, 8), (64, 64, 4), (32, 32, 2))
"""Rows, outputs and warps of a product's tile."""
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
        found = [Tactic("int_conv2d", variant.dtype, ConvOptions(**p, **window)) for p in _products(variant)]
    elif isinstance(variant, LinearVariant):
        found = [Tactic("int_gemm", variant.dtype, GemmOptions(**p)) for p in _products(variant)]
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


def _products(variant: LinearVariant | ConvVariant) -> list[dict[str, Any]]:
    depth = max(_WIDTH if variant.channels % _WIDTH == 0 else tile_channels(variant.channels), variant.block)
    form = "words" if variant.channels % 8 == 0 else "nibbles"
    return [
        {
            "form": form,
            "rotation": variant.block,
            "even": form == "words" and variant.channels % depth == 0,
            "aligned": variant.channels % 16 == 0 and variant.outputs % 16 == 0,
            "tile_rows": rows,
            "tile_outputs": outputs,
            "tile_channels": depth,
            "num_warps": warps,
            "num_stages": 3 if depth <= _WIDTH else 2,
        }
        for rows, outputs, warps in _TILES
        # A wider tile is held by fewer rows: registers and 48 KiB of shared memory.
        if rows * depth <= 128 * _WIDTH
    ]
