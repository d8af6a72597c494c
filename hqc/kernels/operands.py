"""What an integer product takes besides its codes: the weight in its form, and what the epilogue adds."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqc.errors import KernelError
from hqc.kernels.guards import check_rows, check_tensor, float_name
from hqc.kernels.options import BLOCKS, WeightForm
from hqc.kernels.parameters import REGULAR_BLOCKS

__all__ = [
    "ColumnStatistics",
    "Epilogue",
    "Quantiser",
    "Weight",
    "check_epilogue",
    "check_quantiser",
    "check_weight",
    "weight_form",
]


@dataclass(frozen=True)
class Weight:
    """A layer's weight as a kernel reads it.

    codes: int8 [O, C] or [O, kh, kw, C], already multiplied by H where the site is rotated; or four-bit codes packed by
    `pack_weight`, uint8 with ⌈C/2⌉ in the place of C, which are not: then `rotation` is the block of H that the kernel
    multiplies them with (1: none), `regular` its kind, and `packed_weight_fits` has said that it may.
    high: a second digit, int8 of the same shape; the weight is codes + high_factor·high.  128 for `hqc::digit`, 1 for
    `hqc::half`.
    scale: fp32 [O], with the rotation's 1/√b in it.
    """

    codes: Tensor
    scale: Tensor
    high: Tensor | None = None
    high_factor: int = 128
    rotation: int = 1
    regular: bool = False

    @property
    def packed(self) -> bool:
        """Whether the codes are two a byte."""
        return self.codes.dtype == torch.uint8


@dataclass(frozen=True)
class Quantiser:
    """q = clip(round((H_block·y/√block)·inverse_scale[n]), low, high); inverse_scale fp32 [N], one a sample.

    regular: H is the regular one, not Sylvester's.
    low and high None: each sample has its own, and inverse_scale is [N, 3]: 1/s, least and largest code.
    """

    inverse_scale: Tensor
    low: int | None
    high: int | None
    block: int = 1
    regular: bool = False

    @property
    def form(self) -> dict[str, int | None]:
        """What kernels are compiled for of it: the rotation and bounds."""
        return {"block": self.block, "regular": self.regular, "low": self.low, "high": self.high}


@dataclass(frozen=True)
class Epilogue:
    """What follows the product: + bias [O], + shift [N, O], + residual, SiLU, gate; in dtype, or codes.

    shift: one vector a sample, its last axis contiguous.  residual: of the output's shape and dtype.
    gate: "silu", "gelu" or "gelu_tanh": outputs are pairs (a, g), and y = a·gate(g) has half of them.
    quantiser: the output is its codes, int8.
    """

    bias: Tensor | None = None
    residual: Tensor | None = None
    silu: bool = False
    dtype: torch.dtype = torch.float16
    shift: Tensor | None = None
    gate: str = "none"
    quantiser: Quantiser | None = None

    @property
    def output_dtype(self) -> torch.dtype:
        """Of the result."""
        return self.dtype if self.quantiser is None else torch.int8


@dataclass(frozen=True)
class ColumnStatistics:
    """Of x [N, …, C]: mean and Σ (x - mean)² of every channel over blocks of `rows` rows of a sample, the last shorter.

    values fp32 [N, ⌈rows of a sample / rows⌉, 2, C].
    """

    values: Tensor
    rows: int


def weight_form(weight: Weight, channels: int) -> WeightForm:
    """How the kernel reads the weight: lines of whole, aligned words are read as words."""
    if not weight.packed:
        return "int8"
    return "words" if channels % 8 == 0 and weight.codes.data_ptr() % 4 == 0 else "nibbles"


def check_weight(where: str, weight: Weight, kernel: tuple[int, ...], channels: int) -> int:
    """The number of outputs of a weight whose shape, dtype and options fit each other and the codes.

    Raises:
        KernelError: naming what does not fit.
    """
    stored = (channels + 1) // 2 if weight.packed else channels
    check_tensor(where, "weight", weight.codes, dtype=(torch.int8, torch.uint8), shape=(None, *kernel, stored))
    outputs = weight.codes.shape[0]
    check_tensor(where, "weight.scale", weight.scale, dtype=torch.float32, shape=(outputs,))
    _check_order(where, "the rotation", weight.rotation, regular=weight.regular)
    if weight.rotation > 1 and not weight.packed:
        found = f"an int8 weight comes with a rotation of {weight.rotation}, expected 1"
        raise KernelError(where, found, "Store it rotated, or pack it.")
    if channels % weight.rotation:
        found = f"there are {channels} channels, expected a multiple of the rotation {weight.rotation}"
        raise KernelError(where, found, "Use the block that hqc.ops.block_size gives.")
    if weight.high is not None:
        if weight.packed:
            found = "a packed weight comes with a second digit, expected none"
            raise KernelError(where, found, "Use two int8 digits.")
        check_tensor(where, "weight.high", weight.high, dtype=torch.int8, shape=weight.codes.shape)
    return outputs


def _check_order(where: str, name: str, order: int, *, regular: bool) -> None:
    allowed = REGULAR_BLOCKS if regular else BLOCKS
    if order not in allowed:
        raise KernelError(where, f"{name} is {order}, expected one of {allowed}", "Choose one of those.")


def check_epilogue(where: str, epilogue: Epilogue, samples: int, outputs: int, shape: Sequence[int]) -> None:
    """Refuses a bias, shift, residual, gate or dtype that does not fit a product of `outputs` and a result of `shape`.

    Raises:
        KernelError: naming what does not fit.
    """
    float_name(where, epilogue.dtype)
    if epilogue.bias is not None:
        check_tensor(where, "bias", epilogue.bias, dtype=torch.float32, shape=(outputs,))
    if epilogue.shift is not None:
        check_rows(where, "shift", epilogue.shift, (samples, outputs))
    if epilogue.residual is not None:
        check_tensor(where, "residual", epilogue.residual, dtype=epilogue.dtype, shape=(*shape[:-1], outputs))
    if epilogue.gate != "none" and outputs % 2:
        raise KernelError(where, f"there are {outputs} outputs, expected pairs for a gate", "Check the weight.")
    if epilogue.quantiser is not None:
        check_quantiser(where, epilogue.quantiser, samples, shape[-1])


def check_quantiser(where: str, quantiser: Quantiser, samples: int, channels: int) -> None:
    """Refuses a block that does not divide the channels, or scales of another number of samples.

    Raises:
        KernelError: naming what does not fit.
    """
    shape = (samples, 3) if quantiser.low is None else (samples,)
    check_tensor(where, "inverse_scale", quantiser.inverse_scale, dtype=torch.float32, shape=shape)
    _check_order(where, "block", quantiser.block, regular=quantiser.regular)
    if channels % quantiser.block:
        found = f"x has {channels} channels, expected a multiple of the block {quantiser.block}"
        raise KernelError(where, found, "Use the block that hqc.ops.block_size gives.")
