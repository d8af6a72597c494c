"""The plugin nodes: types and formats that they take, their output, the kernels that they need, and the launch.

    HadamardQuantize(x, inv_scale [N]; block, low, high, channel_axis, regular) -> int8, the shape of x
    HadamardQuantizeBounded(x, step [N, 3]; block, channel_axis, regular) -> int8, the shape of x
    Int4Linear(q […, K], weight [O, K/2], scale_w [O], scale_a [N], bias [O]; block, out_type, regular) -> […, O]
    Int4Conv(q [N, C, H, W], weight [O, kernel²·C/2], …; block, kernel, stride, padding, out_type, regular)
        -> [N, O, H', W']

step is 1/s, the least and the largest code of every sample. block is the order of H, 1 for none; regular says which H,
1 the regular one, 0 Sylvester's. Sizes are whole numbers, or TensorRT's expressions of sizes that are known when the
engine runs: the same formulas serve both. Channels and outputs are always whole numbers.

Images are NCHW to ONNX and to TensorRT, whatever lies in memory. The kernels read and write NHWC, which is what
TensorRT calls HWC16 (int8), HWC8 (float16 and bfloat16) and HWC (float32), as long as the channels fill the vector.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from .problems import PluginError

__all__ = ["OPS", "Choice", "ConvVariant", "HadamardVariant", "Launch", "LinearVariant", "Op", "Variant"]

Size: TypeAlias = Any
Dims: TypeAlias = Sequence[Size]
CeilDiv: TypeAlias = Callable[[Size, int], Size]
Attributes: TypeAlias = Mapping[str, int]

AGAIN = "Export the model again."
NO_PLUGINS = "Export the model with --plugins none."

OUT_TYPES: Mapping[int, str] = {1: "fp32", 10: "fp16", 16: "bf16"}
"""ONNX's numbers of the types that a product may be written in."""
_LAST: Mapping[str, str] = {"fp32": "HWC", "fp16": "HWC8", "bf16": "HWC8"}
"""Channels-last formats of activations."""
_VECTOR: Mapping[str, int] = {"HWC": 1, "HWC8": 8, "HWC16": 16}


@dataclass(frozen=True)
class Launch:
    """The kernel's 32-bit arguments, which stand between its inputs and its output, and its grid."""

    integers: tuple[Size, ...]
    grid: tuple[Size, Size, Size]


class Variant(Protocol):
    """What a kernel is compiled for, as far as the node decides; `key` names it in plugins.json."""

    @property
    def key(self) -> str:
        """One line of text."""
        ...

    def launch(self, dims: Dims, tile: tuple[int, int], ceil_div: CeilDiv) -> Launch:
        """For the first input's sizes, and a kernel whose tile has so many rows and columns."""
        ...


@dataclass(frozen=True)
class Choice:
    """One way to run a node: its kernels, and the type and format of every input and of the output, in order."""

    variant: Variant
    types: tuple[str, ...]
    formats: tuple[str, ...]


class Op(Protocol):
    """A plugin node."""

    name: str
    attributes: tuple[str, ...]
    inputs: tuple[str, ...]

    def choices(self, dims: Sequence[Dims], dtype: str, attributes: Attributes) -> tuple[Choice, ...]:
        """The ways to run a node with inputs of these sizes, the first of type `dtype`.

        Raises:
            PluginError: if no kernel takes it.
        """
        ...

    def output(self, dims: Sequence[Dims], attributes: Attributes) -> tuple[tuple[Size, ...], str]:
        """Sizes and type of the output."""
        ...


# ---- HadamardQuantize ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HadamardVariant:
    """layout: "tokens" [N, …, C]; "nhwc" an image whose channels lie last in memory; "nchw" one that is turned so.

    low and high None: every sample has its own bounds, beside its scale.
    """

    dtype: str
    layout: str
    channels: int
    block: int
    low: int | None
    high: int | None
    regular: bool = False

    @property
    def key(self) -> str:
        """See `Variant`."""
        sizes = f"{self.dtype} {self.layout} channels={self.channels} {_rotation(self)}"
        if self.low is None:
            return f"HadamardQuantizeBounded {sizes}"
        return f"HadamardQuantize {sizes} low={self.low} high={self.high}"

    def launch(self, dims: Dims, tile: tuple[int, int], ceil_div: CeilDiv) -> Launch:
        """See `Variant`."""
        columns = -(-self.channels // tile[1])
        places = dims[1:-1] if self.layout == "tokens" else dims[2:]
        per_sample = _product(places)
        if self.layout == "nchw":
            return Launch((self.channels, per_sample), (columns, ceil_div(per_sample, tile[0]), dims[0]))
        rows = _product((dims[0], *places))
        return Launch((rows, self.channels, per_sample), (ceil_div(rows, tile[0]), columns, 1))


class HadamardQuantize:
    """Rotates, scales, rounds and clips in one pass over memory."""

    name = "HadamardQuantize"
    attributes: tuple[str, ...] = ("block", "low", "high", "channel_axis", "regular")
    inputs: tuple[str, ...] = ("x", "inv_scale")

    def choices(self, dims: Sequence[Dims], dtype: str, attributes: Attributes) -> tuple[Choice, ...]:
        """See `Op`."""
        return _rotations(self.name, dims[0], dtype, attributes, (attributes["low"], attributes["high"]))

    def output(self, dims: Sequence[Dims], attributes: Attributes) -> tuple[tuple[Size, ...], str]:
        """See `Op`."""
        return tuple(dims[0]), "int8"


class HadamardQuantizeBounded:
    """The same with bounds of its own for every sample: an asymmetric range whose timestep picks its zero point."""

    name = "HadamardQuantizeBounded"
    attributes: tuple[str, ...] = ("block", "channel_axis", "regular")
    inputs: tuple[str, ...] = ("x", "step")

    def choices(self, dims: Sequence[Dims], dtype: str, attributes: Attributes) -> tuple[Choice, ...]:
        """See `Op`."""
        step = dims[1]
        if len(step) != 2 or step[1] != 3:
            raise PluginError(self.name, "step is not [N, 3]: 1/s, the least and the largest code", AGAIN)
        return _rotations(self.name, dims[0], dtype, attributes, (None, None))

    def output(self, dims: Sequence[Dims], attributes: Attributes) -> tuple[tuple[Size, ...], str]:
        """See `Op`."""
        return tuple(dims[0]), "int8"


def _rotations(
    op: str, sizes: Dims, dtype: str, attributes: Attributes, bounds: tuple[int | None, int | None]
) -> tuple[Choice, ...]:
    """The ways to rotate and quantise x of these sizes."""
    rank, axis = len(sizes), attributes["channel_axis"]
    image = axis == 1 and rank == 4
    if not image and axis not in (-1, rank - 1):
        raise PluginError(op, f"channel_axis is {axis} of {rank}, expected the last, or 1 of 4", NO_PLUGINS)
    channels = _static(sizes[1 if image else rank - 1], op, "channels")
    regular = _kind(op, attributes, channels)

    def choice(layout: str, x_format: str, codes_format: str) -> Choice:
        variant = HadamardVariant(dtype, layout, channels, attributes["block"], *bounds, regular)
        return Choice(variant, (dtype, "fp32", "int8"), (x_format, "LINEAR", codes_format))

    if not image:
        return (choice("tokens", "LINEAR", "LINEAR"),)
    _fills(op, channels, "HWC16")
    return choice("nchw", "LINEAR", "HWC16"), choice("nhwc", _LAST[dtype], "HWC16")


# ---- products ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LinearVariant:
    """dtype is that of the output; block the order of H that the kernel multiplies its weights with, 1 for none."""

    dtype: str
    channels: int
    outputs: int
    block: int
    regular: bool = False

    @property
    def key(self) -> str:
        """See `Variant`."""
        return f"Int4Linear {self.dtype} channels={self.channels} outputs={self.outputs} {_rotation(self)}"

    def launch(self, dims: Dims, tile: tuple[int, int], ceil_div: CeilDiv) -> Launch:
        """See `Variant`."""
        rows, per_sample = _product(dims[:-1]), _product(dims[1:-1])
        programs = ceil_div(rows, tile[0]) * -(-self.outputs // tile[1])
        return Launch((rows, self.channels, self.outputs, per_sample), (programs, 1, 1))


@dataclass(frozen=True)
class ConvVariant:
    """A square window over an image whose channels lie last in memory."""

    dtype: str
    channels: int
    outputs: int
    block: int
    kernel: int
    stride: int
    padding: int
    regular: bool = False

    @property
    def key(self) -> str:
        """See `Variant`."""
        window = f"kernel={self.kernel} stride={self.stride} padding={self.padding}"
        return f"Int4Conv {self.dtype} channels={self.channels} outputs={self.outputs} {_rotation(self)} {window}"

    def launch(self, dims: Dims, tile: tuple[int, int], ceil_div: CeilDiv) -> Launch:
        """See `Variant`."""
        samples, _, height, width = dims
        places = tuple(_window(size, self.kernel, self.stride, self.padding) for size in (height, width))
        rows = _product((samples, *places))
        programs = ceil_div(rows, tile[0]) * -(-self.outputs // tile[1])
        return Launch((rows, height, width, self.channels, self.outputs, *places), (programs, 1, 1))


class Int4Linear:
    """int8 codes times packed four-bit weights, rescaled."""

    name = "Int4Linear"
    attributes: tuple[str, ...] = ("block", "out_type", "regular")
    inputs: tuple[str, ...] = ("q", "weight", "scale_w", "scale_a", "bias")

    def choices(self, dims: Sequence[Dims], dtype: str, attributes: Attributes) -> tuple[Choice, ...]:
        """See `Op`."""
        _codes(self.name, dtype)
        out = _out_type(self.name, attributes)
        outputs, stored = (_static(size, self.name, "weights") for size in dims[1])
        channels = _static(dims[0][len(dims[0]) - 1], self.name, "channels")
        if channels != 2 * stored:
            raise PluginError(self.name, f"{channels} channels meet weights of {2 * stored}", AGAIN)
        variant = LinearVariant(out, channels, outputs, attributes["block"], _kind(self.name, attributes, channels))
        return (Choice(variant, _product_types(out), ("LINEAR",) * 6),)

    def output(self, dims: Sequence[Dims], attributes: Attributes) -> tuple[tuple[Size, ...], str]:
        """See `Op`."""
        leading = [dims[0][i] for i in range(len(dims[0]) - 1)]
        return (*leading, dims[1][0]), _out_type(self.name, attributes)


class Int4Conv:
    """The same as a convolution."""

    name = "Int4Conv"
    attributes: tuple[str, ...] = ("block", "kernel", "stride", "padding", "out_type", "regular")
    inputs: tuple[str, ...] = ("q", "weight", "scale_w", "scale_a", "bias")

    def choices(self, dims: Sequence[Dims], dtype: str, attributes: Attributes) -> tuple[Choice, ...]:
        """See `Op`."""
        _codes(self.name, dtype)
        out = _out_type(self.name, attributes)
        outputs, stored = (_static(size, self.name, "weights") for size in dims[1])
        channels = _static(dims[0][1], self.name, "channels")
        taps = 2 * stored // channels
        if taps * channels != 2 * stored or taps != attributes["kernel"] ** 2:
            window = f"a window of {channels} channels and side {attributes['kernel']}"
            raise PluginError(self.name, f"weights of {2 * stored} are not those of {window}", AGAIN)
        regular = _kind(self.name, attributes, channels)
        _fills(self.name, channels, "HWC16")
        _fills(self.name, outputs, _LAST[out])
        sizes = (attributes["kernel"], attributes["stride"], attributes["padding"])
        variant = ConvVariant(out, channels, outputs, attributes["block"], *sizes, regular)
        return (Choice(variant, _product_types(out), ("HWC16", "LINEAR", "LINEAR", "LINEAR", "LINEAR", _LAST[out])),)

    def output(self, dims: Sequence[Dims], attributes: Attributes) -> tuple[tuple[Size, ...], str]:
        """See `Op`."""
        window = [attributes[name] for name in ("kernel", "stride", "padding")]
        places = (_window(dims[0][axis], *window) for axis in (2, 3))
        return (dims[0][0], dims[1][0], *places), _out_type(self.name, attributes)


_NODES: tuple[Op, ...] = (HadamardQuantize(), HadamardQuantizeBounded(), Int4Linear(), Int4Conv())
OPS: Mapping[str, Op] = {op.name: op for op in _NODES}
"""The plugin nodes by name."""


# ---- sizes and types -----------------------------------------------------------------------------------------------


def _product(sizes: Dims) -> Size:
    """1 for none; starts with the first, because TensorRT's expressions stand on the left of a product only."""
    total: Size = 1
    for index, size in enumerate(sizes):
        total = size if index == 0 else total * size
    return total


def _window(size: Size, kernel: int, stride: int, padding: int) -> Size:
    """⌊(size + 2·padding − kernel) / stride⌋ + 1.

    >>> _window(8, 3, 1, 1), _window(8, 3, 2, 1), _window(7, 1, 2, 0)
    (8, 4, 4)
    """
    span = size + 2 * padding - kernel
    return (span if stride == 1 else span // stride) + 1


def _static(size: Size, op: str, what: str) -> int:
    if not isinstance(size, int) or size < 1:
        raise PluginError(op, f"the number of {what} is not known when the engine is built", AGAIN)
    return size


def _fills(op: str, channels: int, layout: str) -> None:
    """TensorRT pads the channels of a vector format, and the kernels do not."""
    if channels % _VECTOR[layout]:
        found = f"{channels} channels do not fill {layout}, which has vectors of {_VECTOR[layout]}"
        raise PluginError(op, found, NO_PLUGINS)


ORDERS: Mapping[int, tuple[int, ...]] = {0: (1, 8, 16, 32, 64, 128, 256), 1: (16, 32, 64, 256)}
"""Orders of H that kernels rotate by, Sylvester's (1 for none) and the regular one."""


def _kind(op: str, attributes: Attributes, channels: int) -> bool:
    """Whether H is the regular one, after a check of its order."""
    block, regular = attributes["block"], attributes["regular"]
    if block < 1 or channels % block:
        raise PluginError(op, f"{channels} channels are not whole blocks of {block}", AGAIN)
    if block not in ORDERS.get(regular, ()):
        raise PluginError(op, f"no kernel rotates in blocks of {block} of kind {regular}", NO_PLUGINS)
    return regular == 1


def _rotation(variant: HadamardVariant | LinearVariant | ConvVariant) -> str:
    return f"block={variant.block}{' regular' if variant.regular else ''}"


def _codes(op: str, dtype: str) -> None:
    if dtype != "int8":
        raise PluginError(op, f"the codes are {dtype}, expected int8", AGAIN)


def _out_type(op: str, attributes: Attributes) -> str:
    if attributes["out_type"] not in OUT_TYPES:
        raise PluginError(op, f"out_type is {attributes['out_type']}, expected one of {tuple(OUT_TYPES)}", AGAIN)
    return OUT_TYPES[attributes["out_type"]]


def _product_types(out: str) -> tuple[str, ...]:
    return "int8", "int8", "fp32", "fp32", "fp32", out
