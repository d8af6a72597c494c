"""What the quantising kernels are compiled for: rotation alone, and with the norm or gate that stands before it."""

from dataclasses import dataclass
from typing import Literal

from hqc.kernels.parameters import (
    FLOATS,
    Constant,
    Parameter,
    check_bounds,
    check_powers_of_two,
    check_rotation,
    check_value,
    float_inputs,
    left_out,
    power_of_two,
    rotation_constants,
)

__all__ = [
    "ACTIVATIONS",
    "AffineOptions",
    "GateOptions",
    "GroupNormOptions",
    "HadamardOptions",
    "LayerNormOptions",
    "StatisticsOptions",
]

ACTIVATIONS = ("none", "silu", "gelu", "gelu_tanh")


@dataclass(frozen=True)
class HadamardOptions:
    """`hadamard_quantize`: block 1 does not rotate; low…high are the codes' bounds; packed stores two codes a byte.

    regular: H is the regular one of `hqc.rotations`, not Sylvester's; the same in every other kernel that rotates.
    low and high None, here and in every kernel: bounds lie beside the scales, [N, 3].

    layout: "rows" for [rows, channels] (tokens, NHWC), "nchw" for [N, channels, pixels] into [N, pixels, channels].
    aligned: ahead of time only: channels (and pixels) are multiples of 16.
    pitch: numbers between the starts of rows, 0 where they lie close.  second: x is two tensors side by side, the first
    of first_channels; rows only, as pitch.
    """

    block: int = 32
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    layout: Literal["rows", "nchw"] = "rows"
    packed: bool = False
    pitch: int = 0
    second: bool = False
    first_channels: int = 0
    aligned: bool = True
    tile_rows: int = 64
    tile_channels: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        check_rotation("block", self.block, regular=self.regular)
        check_value("layout", self.layout, ("rows", "nchw"))
        check_bounds(self.low, self.high)
        if self.packed and (self.low is None or self.high is None or not -8 <= self.low < self.high <= 7):
            raise ValueError(f"packed codes span {self.low}…{self.high}; expected a range within -8…7")
        check_powers_of_two(tile_rows=self.tile_rows, tile_channels=self.tile_channels, num_warps=self.num_warps)
        if self.tile_channels % self.block:
            raise ValueError(f"tile_channels is {self.tile_channels}; expected a multiple of the block {self.block}")

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.hadamard_quantize`."""
        return f"hadamard_quantize_{self.layout}"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments."""
        constants: dict[str, Constant] = {
            **rotation_constants(self.block, self.low, self.high, self.regular),
            "PACKED": self.packed,
            "TILE_ROWS": self.tile_rows,
            "TILE_CHANNELS": self.tile_channels,
        }
        if self.layout == "nchw":
            return constants | {"LOG_TILE_ROWS": self.tile_rows.bit_length() - 1}
        constants |= {"PITCH": self.pitch, "FIRST": self.first_channels}
        return constants | left_out(second=self.second)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`."""
        check_value("dtype", dtype, FLOATS)
        images = [Parameter(n, "input", f"*{dtype}") for n in ("x", *(["second"] if self.second else []))]
        inputs = (*images, *float_inputs("inverse_scale"))
        output = Parameter("codes", "output", "*u8" if self.packed else "*i8")
        if self.layout == "nchw":
            ints: tuple[Parameter, ...] = (
                Parameter("channels", "int32", "i32", self.aligned),
                Parameter("pixels", "int32", "i32", self.aligned),
            )
        else:
            ints = _row_integers(self.aligned)
        return (*inputs, *ints, output)


@dataclass(frozen=True)
class StatisticsOptions:
    """`column_statistics`: mean and squared deviations of channels over blocks of tile_rows pixels."""

    aligned: bool = True
    tile_rows: int = 128
    tile_channels: int = 32
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        check_powers_of_two(tile_rows=self.tile_rows, tile_channels=self.tile_channels, num_warps=self.num_warps)

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.statistics`."""
        return "column_statistics"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments."""
        return {"TILE_ROWS": self.tile_rows, "TILE_CHANNELS": self.tile_channels}

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`."""
        check_value("dtype", dtype, FLOATS)
        return (
            Parameter("x", "input", f"*{dtype}"),
            Parameter("channels", "int32", "i32", self.aligned),
            Parameter("pixels", "int32", "i32"),
            Parameter("statistics", "output", "*fp32"),
        )


_GROUP_SIZES = ("pixels", "blocks", "rows", "second_blocks", "second_rows")


@dataclass(frozen=True)
class AffineOptions:
    """`group_norm_affine`: statistics joined to mean, factor and bias of every channel.

    group_channels: channels of a group.  affine: weight and bias are there.  second: x is two tensors side by side.
    most_blocks: blocks of statistics that are read at a time.
    """

    group_channels: int = 12
    eps: float = 1e-5
    affine: bool = True
    second: bool = False
    most_blocks: int = 8
    aligned: bool = True
    tile_channels: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        check_powers_of_two(most_blocks=self.most_blocks, tile_channels=self.tile_channels, num_warps=self.num_warps)
        if self.group_channels < 1:
            raise ValueError(f"group_channels is {self.group_channels}; expected 1 or more")

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.group_norm`."""
        return "group_norm_affine"

    @property
    def groups(self) -> int:
        """Groups that a tile may touch, rounded up to a power of two."""
        return power_of_two((self.tile_channels + self.group_channels - 2) // self.group_channels + 1)

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        width = power_of_two(self.group_channels)
        constants: dict[str, Constant] = {
            "EPS": self.eps,
            "GROUP_CHANNELS": self.group_channels,
            "GROUPS": self.groups,
            "GROUP_WIDTH": width,
            "BLOCKS": self.most_blocks,
            "TILE_CHANNELS": self.tile_channels,
        }
        absent = left_out(second_statistics=self.second, weight=self.affine, bias=self.affine)
        return constants | absent

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters; everything is float32."""
        check_value("dtype", dtype, FLOATS)
        inputs = ["statistics", *(["second_statistics"] if self.second else [])]
        inputs += ["weight", "bias"] if self.affine else []
        return (*float_inputs(*inputs), *self._integers(), Parameter("affine", "output", "*fp32"))

    def _integers(self) -> tuple[Parameter, ...]:
        channels = tuple(Parameter(name, "int32", "i32", self.aligned) for name in ("channels", "first_channels"))
        return (*channels, *(Parameter(name, "int32", "i32") for name in _GROUP_SIZES))


@dataclass(frozen=True)
class GroupNormOptions(AffineOptions):
    """`group_norm_quantize`: group norm, SiLU, rotation and quantisation of channels-last images.

    joined: the statistics are those of `group_norm_affine`.  codes, keep: which outputs there are, codes or floats.
    beside: codes of x itself as well, with a block and bounds of their own.
    """

    joined: bool = False
    silu: bool = True
    codes: bool = True
    keep: bool = False
    block: int = 32
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    beside: bool = False
    beside_block: int = 1
    beside_regular: bool = False
    beside_low: int | None = -127
    beside_high: int | None = 127
    tile_rows: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_rotation("beside_block", self.beside_block, regular=self.beside_regular)
        check_bounds(self.beside_low, self.beside_high)
        check_rotation("block", self.block, regular=self.regular)
        check_bounds(self.low, self.high)
        check_powers_of_two(tile_rows=self.tile_rows)
        block = max(self.block, self.beside_block)
        if self.tile_channels % block:
            raise ValueError(f"tile_channels is {self.tile_channels}; expected a multiple of the block {block}")
        if not (self.codes or self.keep):
            raise ValueError("neither codes nor floats are kept; expected one of them or both")

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.group_norm`."""
        return "group_norm_quantize"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        beside = rotation_constants(self.beside_block, self.beside_low, self.beside_high, self.beside_regular)
        own: dict[str, Constant] = {
            **rotation_constants(self.block, self.low, self.high, self.regular),
            **{f"BESIDE_{name}": value for name, value in beside.items()},
            "JOINED": self.joined,
            "SILU": self.silu,
            "TILE_ROWS": self.tile_rows,
        }
        parted = self.second and not self.joined
        affine = self.affine and not self.joined
        absent = left_out(
            second=self.second,
            second_statistics=parted,
            weight=affine,
            bias=affine,
            inverse_scale=self.codes,
            beside_scale=self.beside,
            y=self.keep,
            codes=self.codes,
            beside=self.beside,
        )
        kept = {name: value for name, value in super().constants().items() if not name.endswith("_ptr")}
        return kept | own | absent

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`; the floats that are kept have it as well."""
        check_value("dtype", dtype, FLOATS)
        images = [Parameter(n, "input", f"*{dtype}") for n in ("x", *(["second"] if self.second else []))]
        floats = ["statistics"]
        if not self.joined:
            floats += ["second_statistics"] if self.second else []
            floats += ["weight", "bias"] if self.affine else []
        floats += ["inverse_scale"] if self.codes else []
        floats += ["beside_scale"] if self.beside else []
        outputs = [Parameter("y", "output", f"*{dtype}")] if self.keep else []
        outputs += [Parameter("codes", "output", "*i8")] if self.codes else []
        outputs += [Parameter("beside", "output", "*i8")] if self.beside else []
        return (*images, *float_inputs(*floats), *self._integers(), *outputs)


@dataclass(frozen=True)
class LayerNormOptions:
    """`layer_norm_quantize`: layer norm, rotation and quantisation of rows; a tile holds whole rows.

    affine: weight and bias are there.  keep: the floats are written as well.
    """

    eps: float = 1e-5
    affine: bool = True
    keep: bool = False
    block: int = 32
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    aligned: bool = True
    tile_rows: int = 8
    tile_channels: int = 512
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        _check_tile(self)

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.layer_norm`."""
        return "layer_norm_quantize"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        constants: dict[str, Constant] = {
            "EPS": self.eps,
            **rotation_constants(self.block, self.low, self.high, self.regular),
            "TILE_ROWS": self.tile_rows,
            "TILE_CHANNELS": self.tile_channels,
        }
        return constants | left_out(weight=self.affine, bias=self.affine, y=self.keep)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`; the floats that are kept have it as well."""
        check_value("dtype", dtype, FLOATS)
        floats = [*(["weight", "bias"] if self.affine else []), "inverse_scale"]
        outputs = [*([Parameter("y", "output", f"*{dtype}")] if self.keep else []), Parameter("codes", "output", "*i8")]
        return (Parameter("x", "input", f"*{dtype}"), *float_inputs(*floats), *_row_integers(self.aligned), *outputs)


@dataclass(frozen=True)
class GateOptions:
    """`gate_quantize`: an activation, or a gate of two halves, rotation and quantisation.

    kind: the activation.  gated: x is [rows, 2·channels], the second half goes through the activation.
    """

    kind: Literal["none", "silu", "gelu", "gelu_tanh"] = "gelu"
    gated: bool = True
    block: int = 32
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    aligned: bool = True
    tile_rows: int = 16
    tile_channels: int = 128
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        check_value("kind", self.kind, ACTIVATIONS)
        _check_tile(self)

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.gate`."""
        return "gate_quantize"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments."""
        return {
            "KIND": self.kind,
            "GATED": self.gated,
            **rotation_constants(self.block, self.low, self.high, self.regular),
            "TILE_ROWS": self.tile_rows,
            "TILE_CHANNELS": self.tile_channels,
        }

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`."""
        check_value("dtype", dtype, FLOATS)
        inputs = (Parameter("x", "input", f"*{dtype}"), *float_inputs("inverse_scale"))
        return (*inputs, *_row_integers(self.aligned), Parameter("codes", "output", "*i8"))


def _check_tile(options: LayerNormOptions | GateOptions) -> None:
    check_rotation("block", options.block, regular=options.regular)
    check_bounds(options.low, options.high)
    check_powers_of_two(tile_rows=options.tile_rows, tile_channels=options.tile_channels, num_warps=options.num_warps)
    if options.tile_channels % options.block:
        raise ValueError(f"tile_channels is {options.tile_channels}; expected a multiple of the block {options.block}")


def _row_integers(aligned: bool) -> tuple[Parameter, ...]:
    return (
        Parameter("rows", "int32", "i32"),
        Parameter("channels", "int32", "i32", aligned),
        Parameter("rows_per_sample", "int32", "i32"),
    )
