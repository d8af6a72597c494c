"""What the integer products are compiled for: the form of the weights, the epilogue, the tiles."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

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
    rotation_constants,
)
from hqc.kernels.quantiser_options import ACTIVATIONS

__all__ = ["ConvOptions", "EpilogueOptions", "GemmOptions", "SumOptions", "WeightForm"]

WeightForm: TypeAlias = Literal["int8", "nibbles", "words"]


@dataclass(frozen=True)
class EpilogueOptions:
    """What follows a product's sums, in the order of `write_outputs`.

    shift: a vector a sample is added, rows of it shift_pitch numbers apart.
    whole: every tile lies in one sample.
    gate: outputs are pairs, and y = a·gate(g) is half as wide.
    codes: y is rotated by block and quantised to low…high.
    statistics: mean and squared deviations of y's columns over each tile's rows; needs whole.
    """

    bias: bool = True
    shift: bool = False
    shift_pitch: int = 0
    residual: bool = False
    silu: bool = False
    whole: bool = False
    gate: str = "none"
    codes: bool = False
    block: int = 1
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    statistics: bool = False

    @property
    def any_epilogue(self) -> bool:
        """Whether anything but the scales is applied."""
        gated = self.gate != "none"
        return self.bias or self.shift or self.residual or self.silu or gated or self.codes or self.statistics

    def _check_epilogue(self, outputs: int) -> None:
        """outputs: of a tile."""
        check_value("gate", self.gate, ACTIVATIONS)
        check_rotation("block", self.block, regular=self.regular)
        check_bounds(self.low, self.high)
        wide = outputs // 2 if self.gate != "none" else outputs
        if self.codes and wide % self.block:
            raise ValueError(f"a tile ends with {wide} outputs; expected a multiple of the block {self.block}")
        if self.statistics and (self.codes or not self.whole):
            raise ValueError("statistics of codes, or of tiles over several samples; expected floats and whole tiles")

    def _epilogue_constants(self) -> dict[str, Constant]:
        return {
            "SHIFT_PITCH": self.shift_pitch,
            "WHOLE": self.whole,
            "SILU": self.silu,
            "GATE": self.gate,
            **rotation_constants(self.block, self.low, self.high, self.regular),
            **left_out(
                bias=self.bias,
                shift=self.shift,
                residual=self.residual,
                inverse_scale=self.codes,
                statistics=self.statistics,
            ),
        }

    def _epilogue_inputs(self, dtype: str) -> list[Parameter]:
        check_value("dtype", dtype, FLOATS)
        inputs = float_inputs("weight_scale", "scale", *(["bias"] if self.bias else []))
        inputs += float_inputs("shift") if self.shift else []
        inputs += [Parameter("residual", "input", f"*{dtype}")] if self.residual else []
        return inputs + (float_inputs("inverse_scale") if self.codes else [])

    def _outputs(self, dtype: str) -> tuple[Parameter, ...]:
        y = Parameter("y", "output", "*i8" if self.codes else f"*{dtype}")
        return (y, Parameter("statistics", "output", "*fp32")) if self.statistics else (y,)


@dataclass(frozen=True)
class GemmOptions(EpilogueOptions):
    """`int_gemm`: the form of the weights, what the epilogue adds, and the tiles.

    form: "int8"; or four bits as "words" (channels % 8 == 0) or "nibbles" (any channels).
    rotation: the block of ±1 that four-bit weights are multiplied with inside the kernel; 1 is none; regular_rotation:
    by the regular H, not Sylvester's.
    two_digits: a second int8 weight, counted high_factor times.
    even: channels % tile_channels == 0, so that nothing is masked along them.
    aligned: ahead of time only: channels and outputs are multiples of 16.
    splits: programs that share the inner axis of a tile. With more than one y is int32 [splits, rows, outputs], there
    is no epilogue, and `sum_splits` follows.
    """

    form: WeightForm = "int8"
    rotation: int = 1
    regular_rotation: bool = False
    two_digits: bool = False
    high_factor: int = 128
    even: bool = True
    aligned: bool = True
    tile_rows: int = 128
    tile_outputs: int = 128
    tile_channels: int = 64
    group: int = 8
    splits: int = 1
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_value("form", self.form, ("int8", "nibbles", "words"))
        check_rotation("rotation", self.rotation, regular=self.regular_rotation)
        if self.rotation > 1 and self.form == "int8":
            raise ValueError(f"rotation is {self.rotation} with int8 weights, which are stored rotated; expected 1")
        if self.two_digits and self.form != "int8":
            raise ValueError(f"two digits with {self.form} weights; expected int8")
        check_powers_of_two(
            tile_rows=self.tile_rows,
            tile_outputs=self.tile_outputs,
            tile_channels=self.tile_channels,
            num_warps=self.num_warps,
        )
        if self.tile_channels < 32 or self.tile_channels % self.rotation:
            raise ValueError(
                f"tile_channels is {self.tile_channels}; expected at least 32 and a multiple of the rotation "
                f"{self.rotation}"
            )
        if self.splits < 1 or (self.splits > 1 and self.any_epilogue):
            raise ValueError(f"splits is {self.splits} with an epilogue; expected 1, or no bias, residual and SiLU")
        self._check_epilogue(self.tile_outputs)
        if self.even and self.form == "nibbles":
            raise ValueError('even weights in the form "nibbles"; expected "words", which any even tile allows')

    @property
    def function(self) -> str:
        """The kernel in the module of the same name in `hqc.kernels.jit`."""
        return "int_gemm"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        constants: dict[str, Constant] = {
            "FORM": self.form,
            "ROTATION": self.rotation,
            "REGULAR_ROTATION": self.regular_rotation,
            "HIGH_FACTOR": self.high_factor,
            **self._epilogue_constants(),
            "EVEN": self.even,
            "TILE_ROWS": self.tile_rows,
            "TILE_OUTPUTS": self.tile_outputs,
            "TILE_CHANNELS": self.tile_channels,
            "GROUP": self.group,
            "SPLITS": self.splits,
        }
        return constants | left_out(weight_high=self.two_digits)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for y of `dtype`."""
        weight = {"int8": "*i8", "nibbles": "*u8", "words": "*i32"}[self.form]
        inputs = [Parameter("codes", "input", "*i8"), Parameter("weight", "input", weight)]
        if self.two_digits:
            inputs.append(Parameter("weight_high", "input", "*i8"))
        inputs += self._epilogue_inputs(dtype)
        outputs = (Parameter("y", "output", "*i32"),) if self.splits > 1 else self._outputs(dtype)
        return (*inputs, *self._integers(), *outputs)

    def _integers(self) -> tuple[Parameter, ...]:
        return (
            Parameter("rows", "int32", "i32"),
            Parameter("channels", "int32", "i32", self.aligned),
            Parameter("outputs", "int32", "i32", self.aligned),
            Parameter("rows_per_sample", "int32", "i32"),
        )


@dataclass(frozen=True)
class ConvOptions(GemmOptions):
    """`int_conv2d`: as `GemmOptions`, with the window as (height, width) pairs.

    upsample: the image has every pixel of the codes that many times along each axis.
    """

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    upsample: int = 1

    @property
    def function(self) -> str:
        """The kernel in the module of the same name in `hqc.kernels.jit`."""
        return "int_conv2d"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        names = {"KERNEL": self.kernel, "STRIDE": self.stride, "PAD": self.padding, "DILATION": self.dilation}
        window = {f"{name}_{axis}": pair[i] for name, pair in names.items() for i, axis in enumerate("HW")}
        return super().constants() | window | {"UPSAMPLE": self.upsample}

    def _integers(self) -> tuple[Parameter, ...]:
        names = ("rows", "height", "width", "channels", "outputs", "out_height", "out_width")
        return tuple(Parameter(n, "int32", "i32", self.aligned and n in ("channels", "outputs")) for n in names)


@dataclass(frozen=True)
class SumOptions(EpilogueOptions):
    """`sum_splits`: the sum over the parts of a product with splits, and the epilogue that the product left out."""

    splits: int = 2
    aligned: bool = True
    tile_rows: int = 16
    tile_outputs: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.splits < 2:
            raise ValueError(f"splits is {self.splits}; expected 2 or more")
        check_powers_of_two(tile_rows=self.tile_rows, tile_outputs=self.tile_outputs, num_warps=self.num_warps)
        self._check_epilogue(self.tile_outputs)

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.epilogue`."""
        return "sum_splits"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        return {
            "SPLITS": self.splits,
            **self._epilogue_constants(),
            "TILE_ROWS": self.tile_rows,
            "TILE_OUTPUTS": self.tile_outputs,
        }

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for y of `dtype`."""
        inputs = [Parameter("partial", "input", "*i32"), *self._epilogue_inputs(dtype)]
        integers = (
            Parameter("rows", "int32", "i32"),
            Parameter("outputs", "int32", "i32", self.aligned),
            Parameter("rows_per_sample", "int32", "i32"),
        )
        return (*inputs, *integers, *self._outputs(dtype))
