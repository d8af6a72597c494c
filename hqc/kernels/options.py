"""What a kernel is compiled for: frozen options, their compile-time constants, and the parameters of the entry point.

The launchers and the ahead-of-time compiler read the same options, so both run the same code.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "KERNELS",
    "ConvOptions",
    "GemmOptions",
    "HadamardOptions",
    "KernelOptions",
    "Parameter",
    "Role",
    "SumOptions",
    "WeightForm",
]

Constant: TypeAlias = int | float | bool | str | None
Role: TypeAlias = Literal["input", "int32", "output", "scratch"]
WeightForm: TypeAlias = Literal["int8", "nibbles", "words"]
BLOCKS = (1, 8, 16, 32, 64, 128, 256)
FLOATS = ("fp32", "fp16", "bf16")


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel's entry point, in order.

    role: a pointer in, a 32-bit integer, a pointer out, or one of the two pointers that triton adds at the end.
    type: triton's name (`*fp16`, `i32`, …).  multiple_of_16: an integer that the compiled code takes to be one.
    """

    name: str
    role: Role
    type: str
    multiple_of_16: bool = False


def _check(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(str, allowed))}")


def _check_powers_of_two(**values: int) -> None:
    for name, value in values.items():
        if value < 1 or value & (value - 1):
            raise ValueError(f"{name} is {value}; expected a power of two")


@dataclass(frozen=True)
class HadamardOptions:
    """`hadamard_quantize`: block 1 does not rotate; low…high are the codes' bounds; packed stores two codes a byte.

    layout: "rows" for [rows, channels] (tokens, NHWC), "nchw" for [N, channels, pixels] into [N, pixels, channels].
    aligned: ahead of time only: channels (and pixels) are multiples of 16.
    """

    block: int = 32
    low: int = -7
    high: int = 7
    layout: Literal["rows", "nchw"] = "rows"
    packed: bool = False
    aligned: bool = True
    tile_rows: int = 64
    tile_channels: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        _check("block", self.block, BLOCKS)
        _check("layout", self.layout, ("rows", "nchw"))
        if not -128 <= self.low < self.high <= 127:
            raise ValueError(f"codes span {self.low}…{self.high}; expected a range within -128…127")
        if self.packed and not -8 <= self.low < self.high <= 7:
            raise ValueError(f"packed codes span {self.low}…{self.high}; expected a range within -8…7")
        _check_powers_of_two(tile_rows=self.tile_rows, tile_channels=self.tile_channels, num_warps=self.num_warps)
        if self.tile_channels % self.block:
            raise ValueError(f"tile_channels is {self.tile_channels}; expected a multiple of the block {self.block}")

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.hadamard_quantize`."""
        return f"hadamard_quantize_{self.layout}"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments."""
        constants: dict[str, Constant] = {
            "NORM": 1 / math.sqrt(self.block),
            "LOW": self.low,
            "HIGH": self.high,
            "LOG_BLOCK": self.block.bit_length() - 1,
            "PACKED": self.packed,
            "TILE_ROWS": self.tile_rows,
            "TILE_CHANNELS": self.tile_channels,
        }
        if self.layout == "nchw":
            constants["LOG_TILE_ROWS"] = self.tile_rows.bit_length() - 1
        return constants

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for x of `dtype`."""
        _check("dtype", dtype, FLOATS)
        inputs = (Parameter("x", "input", f"*{dtype}"), Parameter("inverse_scale", "input", "*fp32"))
        output = Parameter("codes", "output", "*u8" if self.packed else "*i8")
        if self.layout == "nchw":
            ints: tuple[Parameter, ...] = (
                Parameter("channels", "int32", "i32", self.aligned),
                Parameter("pixels", "int32", "i32", self.aligned),
            )
        else:
            ints = (
                Parameter("rows", "int32", "i32"),
                Parameter("channels", "int32", "i32", self.aligned),
                Parameter("rows_per_sample", "int32", "i32"),
            )
        return (*inputs, *ints, output)


def _left_out(**present: bool) -> dict[str, None]:
    """Pointers to what is not there are constants: None."""
    return {f"{name}_ptr": None for name, there in present.items() if not there}


def _epilogue_inputs(dtype: str, *, bias: bool, residual: bool) -> list[Parameter]:
    """What `write_outputs` reads."""
    _check("dtype", dtype, FLOATS)
    inputs = [Parameter("weight_scale", "input", "*fp32"), Parameter("scale", "input", "*fp32")]
    if bias:
        inputs.append(Parameter("bias", "input", "*fp32"))
    if residual:
        inputs.append(Parameter("residual", "input", f"*{dtype}"))
    return inputs


@dataclass(frozen=True)
class GemmOptions:
    """`int_gemm`: the form of the weights, what the epilogue adds, and the tiles.

    form: "int8"; or four bits as "words" (channels % 8 == 0) or "nibbles" (any channels).
    rotation: the block of ±1 that four-bit weights are multiplied with inside the kernel; 1 is none.
    two_digits: a second int8 weight, counted high_factor times.
    even: channels % tile_channels == 0, so that nothing is masked along them.
    aligned: ahead of time only: channels and outputs are multiples of 16.
    splits: programs that share the inner axis of a tile. With more than one y is int32 [splits, rows, outputs], there
    is no epilogue, and `sum_splits` follows.
    """

    form: WeightForm = "int8"
    rotation: int = 1
    two_digits: bool = False
    high_factor: int = 128
    bias: bool = True
    residual: bool = False
    silu: bool = False
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
        _check("form", self.form, ("int8", "nibbles", "words"))
        _check("rotation", self.rotation, BLOCKS)
        if self.rotation > 1 and self.form == "int8":
            raise ValueError(f"rotation is {self.rotation} with int8 weights, which are stored rotated; expected 1")
        if self.two_digits and self.form != "int8":
            raise ValueError(f"two digits with {self.form} weights; expected int8")
        _check_powers_of_two(
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
        if self.splits < 1 or (self.splits > 1 and (self.bias or self.residual or self.silu)):
            raise ValueError(f"splits is {self.splits} with an epilogue; expected 1, or no bias, residual and SiLU")
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
            "HIGH_FACTOR": self.high_factor,
            "SILU": self.silu,
            "EVEN": self.even,
            "TILE_ROWS": self.tile_rows,
            "TILE_OUTPUTS": self.tile_outputs,
            "TILE_CHANNELS": self.tile_channels,
            "GROUP": self.group,
            "SPLITS": self.splits,
        }
        return constants | _left_out(weight_high=self.two_digits, bias=self.bias, residual=self.residual)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for y of `dtype`."""
        weight = {"int8": "*i8", "nibbles": "*u8", "words": "*i32"}[self.form]
        inputs = [Parameter("codes", "input", "*i8"), Parameter("weight", "input", weight)]
        if self.two_digits:
            inputs.append(Parameter("weight_high", "input", "*i8"))
        inputs += _epilogue_inputs(dtype, bias=self.bias, residual=self.residual)
        output = "*i32" if self.splits > 1 else f"*{dtype}"
        return (*inputs, *self._integers(), Parameter("y", "output", output))

    def _integers(self) -> tuple[Parameter, ...]:
        return (
            Parameter("rows", "int32", "i32"),
            Parameter("channels", "int32", "i32", self.aligned),
            Parameter("outputs", "int32", "i32", self.aligned),
            Parameter("rows_per_sample", "int32", "i32"),
        )


@dataclass(frozen=True)
class ConvOptions(GemmOptions):
    """`int_conv2d`: as `GemmOptions`, with the window as (height, width) pairs."""

    kernel: tuple[int, int] = (3, 3)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)

    @property
    def function(self) -> str:
        """The kernel in the module of the same name in `hqc.kernels.jit`."""
        return "int_conv2d"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        names = {"KERNEL": self.kernel, "STRIDE": self.stride, "PAD": self.padding, "DILATION": self.dilation}
        window = {f"{name}_{axis}": pair[i] for name, pair in names.items() for i, axis in enumerate("HW")}
        return super().constants() | window

    def _integers(self) -> tuple[Parameter, ...]:
        names = ("rows", "height", "width", "channels", "outputs", "out_height", "out_width")
        return tuple(Parameter(n, "int32", "i32", self.aligned and n in ("channels", "outputs")) for n in names)


@dataclass(frozen=True)
class SumOptions:
    """`sum_splits`: the sum over the parts of a product with splits, and the epilogue that the product left out."""

    splits: int = 2
    bias: bool = True
    residual: bool = False
    silu: bool = False
    aligned: bool = True
    tile_rows: int = 16
    tile_outputs: int = 64
    num_warps: int = 4
    num_stages: int = 1

    def __post_init__(self) -> None:
        if self.splits < 2:
            raise ValueError(f"splits is {self.splits}; expected 2 or more")
        _check_powers_of_two(tile_rows=self.tile_rows, tile_outputs=self.tile_outputs, num_warps=self.num_warps)

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.epilogue`."""
        return "sum_splits"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        constants: dict[str, Constant] = {
            "SPLITS": self.splits,
            "SILU": self.silu,
            "TILE_ROWS": self.tile_rows,
            "TILE_OUTPUTS": self.tile_outputs,
        }
        return constants | _left_out(bias=self.bias, residual=self.residual)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for y of `dtype`."""
        inputs = [Parameter("partial", "input", "*i32")]
        inputs += _epilogue_inputs(dtype, bias=self.bias, residual=self.residual)
        integers = (
            Parameter("rows", "int32", "i32"),
            Parameter("outputs", "int32", "i32", self.aligned),
            Parameter("rows_per_sample", "int32", "i32"),
        )
        return (*inputs, *integers, Parameter("y", "output", f"*{dtype}"))


KernelOptions: TypeAlias = HadamardOptions | GemmOptions | ConvOptions | SumOptions
MODULES: Mapping[str, str] = {
    "hadamard_quantize_rows": "hadamard_quantize",
    "hadamard_quantize_nchw": "hadamard_quantize",
    "int_gemm": "int_gemm",
    "int_conv2d": "int_conv2d",
    "sum_splits": "epilogue",
}
"""Where in `hqc.kernels.jit` each function stands."""
KERNELS: Mapping[str, type[KernelOptions]] = {
    "hadamard_quantize": HadamardOptions,
    "int_gemm": GemmOptions,
    "int_conv2d": ConvOptions,
    "sum_splits": SumOptions,
}
"""Kernels by name, with the options that each takes."""
