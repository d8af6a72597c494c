"""What the attention kernels are compiled for."""

from dataclasses import dataclass

from hqc.kernels.parameters import (
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

__all__ = ["ScoresOptions", "ValuesOptions"]

_HALVES = ("fp16", "bf16")


@dataclass(frozen=True)
class ScoresOptions:
    """`attention_scores`: pitches are the numbers between the starts of rows; scale holds log2 e."""

    scale: float = 0.07
    heads: int = 1
    width: int = 384
    q_pitch: int = 1152
    k_pitch: int = 1152
    tile_rows: int = 128
    tile_keys: int = 128
    tile_channels: int = 64
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_powers_of_two(
            tile_rows=self.tile_rows,
            tile_keys=self.tile_keys,
            tile_channels=self.tile_channels,
            num_warps=self.num_warps,
        )

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.attention`."""
        return "attention_scores"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments."""
        return {
            "SCALE": self.scale,
            "HEADS": self.heads,
            "WIDTH": self.width,
            "Q_PITCH": self.q_pitch,
            "K_PITCH": self.k_pitch,
            "TILE_ROWS": self.tile_rows,
            "TILE_KEYS": self.tile_keys,
            "TILE_CHANNELS": self.tile_channels,
        }

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for q and k of `dtype`."""
        check_value("dtype", dtype, _HALVES)
        inputs = [Parameter(name, "input", f"*{dtype}") for name in ("q", "k")]
        integers = [Parameter(name, "int32", "i32") for name in ("tokens", "keys")]
        outputs = [Parameter("p", "output", f"*{dtype}"), Parameter("maxima", "output", "*fp32")]
        return (*inputs, *integers, *outputs)


@dataclass(frozen=True)
class ValuesOptions:
    """`attention_values`: parts is the number of tiles of keys; codes, block, low, high as in `EpilogueOptions`."""

    heads: int = 1
    width: int = 384
    v_pitch: int = 1152
    parts: int = 8
    codes: bool = False
    block: int = 1
    regular: bool = False
    low: int | None = -7
    high: int | None = 7
    tile_rows: int = 128
    tile_keys: int = 128
    tile_channels: int = 128
    num_warps: int = 8
    num_stages: int = 3

    def __post_init__(self) -> None:
        check_rotation("block", self.block, regular=self.regular)
        check_bounds(self.low, self.high)
        check_powers_of_two(
            tile_rows=self.tile_rows,
            tile_keys=self.tile_keys,
            tile_channels=self.tile_channels,
            num_warps=self.num_warps,
        )
        if self.codes and (self.tile_channels % self.block or self.width % self.block):
            raise ValueError(f"heads are {self.width} wide; expected a multiple of the block {self.block}")

    @property
    def function(self) -> str:
        """The kernel in `hqc.kernels.jit.attention`."""
        return "attention_values"

    def constants(self) -> dict[str, Constant]:
        """Compile-time arguments; pointers that are left out are None."""
        constants: dict[str, Constant] = {
            "HEADS": self.heads,
            "WIDTH": self.width,
            "V_PITCH": self.v_pitch,
            "PARTS": self.parts,
            "MOST_PARTS": power_of_two(self.parts),
            **rotation_constants(self.block, self.low, self.high, self.regular),
            "TILE_ROWS": self.tile_rows,
            "TILE_KEYS": self.tile_keys,
            "TILE_CHANNELS": self.tile_channels,
        }
        return constants | left_out(inverse_scale=self.codes)

    def parameters(self, dtype: str) -> tuple[Parameter, ...]:
        """The entry point's parameters for p and v of `dtype`."""
        check_value("dtype", dtype, _HALVES)
        inputs = [*(Parameter(name, "input", f"*{dtype}") for name in ("p", "v")), *float_inputs("maxima")]
        inputs += float_inputs("inverse_scale") if self.codes else []
        integers = [Parameter(name, "int32", "i32") for name in ("tokens", "keys")]
        return (*inputs, *integers, Parameter("y", "output", "*i8" if self.codes else f"*{dtype}"))
