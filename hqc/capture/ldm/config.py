"""The YAML configuration of an original checkpoint, read as data and checked field by field.

    model.params                          the noise schedule, the latents' scale
    model.params.unet_config.params       the denoiser
    model.params.first_stage_config       the autoencoder, KL or VQ
    model.params.cond_stage_config        a class embedder, a text encoder, or `__is_unconditional__`

Other sections (data, lightning, learning rates) are ignored. A file is hostile until it is read: its size and its
nesting are bounded, aliases and tags of Python objects are refused.
"""

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, field_validator, model_validator

from hqc.errors import CaptureError

__all__ = ["ClassParams", "DecoderParams", "FirstStage", "LdmConfig", "UNetParams", "read_config"]

_LARGEST_FILE = 256 * 2**10
_DEEPEST = 32
_FORMS = ("class", "text", "none")  # that cond_stage_config may have

Size = Annotated[int, Field(ge=1, le=65_536, strict=True)]
Few = Annotated[int, Field(ge=1, le=16, strict=True)]
Levels = Annotated[tuple[Few, ...], Field(min_length=1, max_length=8)]


class _Params(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


class UNetParams(_Params):
    """Options of the original `UNetModel`; those that change nothing after training are taken and ignored."""

    image_size: Annotated[int, Field(ge=1, le=1024, strict=True)]
    in_channels: Size
    out_channels: Size
    model_channels: Annotated[int, Field(ge=32, le=4096, multiple_of=32, strict=True)]
    num_res_blocks: Few
    attention_resolutions: Annotated[tuple[Size, ...], Field(max_length=16)]
    channel_mult: Levels = (1, 2, 4, 8)
    num_heads: int = -1
    num_head_channels: int = -1
    num_heads_upsample: int = -1
    use_spatial_transformer: bool = False
    transformer_depth: Few = 1
    context_dim: Size | None = None
    use_scale_shift_norm: bool = False
    resblock_updown: bool = False
    conv_resample: Literal[True] = True
    dims: Literal[2] = 2
    num_classes: None = None
    n_embed: None = None
    use_new_attention_order: Literal[False] = False
    dropout: float = 0.0
    use_checkpoint: bool = False
    use_fp16: bool = False
    legacy: bool = True
    use_linear_in_transformer: bool = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from the full resolution down."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    @property
    def attended(self) -> tuple[bool, ...]:
        """Which levels have attention: level i works at 1/2^i of the latent's side."""
        return tuple(2**i in self.attention_resolutions for i in range(len(self.channel_mult)))

    def heads(self, channels: int) -> int:
        """Attention heads of a block with so many channels."""
        return self.num_heads if self.num_head_channels == -1 else channels // self.num_head_channels

    @model_validator(mode="after")
    def _consistent(self) -> "UNetParams":
        if (self.num_heads == -1) == (self.num_head_channels == -1):
            raise ValueError("give one of num_heads and num_head_channels")
        for channels in self.channels:
            width = self.num_head_channels if self.num_heads == -1 else self.num_heads
            if width < 1 or channels % width:
                raise ValueError(f"{width} does not divide {channels} channels into heads")
        if self.num_heads_upsample not in (-1, self.num_heads):
            raise ValueError("num_heads_upsample differs from num_heads, which hqc does not convert")
        if self.use_spatial_transformer != (self.context_dim is not None):
            raise ValueError("use_spatial_transformer and context_dim go together")
        if self.use_spatial_transformer and self.resblock_updown:
            raise ValueError("resblock_updown with use_spatial_transformer is not converted by hqc")
        if self.image_size % 2 ** (len(self.channel_mult) - 1):
            raise ValueError(f"image_size {self.image_size} cannot be halved {len(self.channel_mult) - 1} times")
        return self


class DecoderParams(_Params):
    """`ddconfig`: encoder and decoder of the autoencoder."""

    z_channels: Size
    resolution: Annotated[int, Field(ge=1, le=8192, strict=True)]
    in_channels: Size
    out_ch: Size
    ch: Annotated[int, Field(ge=32, le=4096, multiple_of=32, strict=True)]
    ch_mult: Levels
    num_res_blocks: Few
    attn_resolutions: Annotated[tuple[int, ...], Field(max_length=16)]
    double_z: bool = True
    dropout: float = 0.0
    resamp_with_conv: Literal[True] = True
    attn_type: Literal["vanilla"] = "vanilla"
    use_linear_attn: Literal[False] = False
    tanh_out: Literal[False] = False
    give_pre_end: Literal[False] = False

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each level, from the image down."""
        return tuple(self.ch * factor for factor in self.ch_mult)

    @property
    def attended(self) -> tuple[bool, ...]:
        """Which levels have attention, besides the middle, which always has."""
        return tuple(self.resolution // 2**i in self.attn_resolutions for i in range(len(self.ch_mult)))


class FirstStageParams(_Params):
    model_config = ConfigDict(frozen=True, extra="ignore")  # losses, monitors, paths of the training

    embed_dim: Size
    ddconfig: DecoderParams
    n_embed: Annotated[int, Field(ge=1, le=2**20, strict=True)] | None = None
    remap: None = None


class FirstStage(_Params):
    """The autoencoder: `AutoencoderKL`, or `VQModelInterface` with a codebook of n_embed entries."""

    target: str
    params: FirstStageParams

    @property
    def quantised(self) -> bool:
        """Whether latents are snapped to a codebook before they are decoded."""
        return self.target.rpartition(".")[2] in ("VQModelInterface", "VQModel")

    @model_validator(mode="after")
    def _known(self) -> "FirstStage":
        if not self.quantised and self.target.rpartition(".")[2] != "AutoencoderKL":
            raise ValueError(f"target {self.target!r}; expected VQModelInterface or AutoencoderKL")
        if self.quantised and self.params.n_embed is None:
            raise ValueError("n_embed is missing")
        if self.quantised == self.params.ddconfig.double_z:
            raise ValueError(f"double_z is {self.params.ddconfig.double_z} for a {self.target.rpartition('.')[2]}")
        if not self.quantised and self.params.embed_dim != self.params.ddconfig.z_channels:
            raise ValueError("embed_dim differs from z_channels, which diffusers' AutoencoderKL cannot express")
        return self


class ClassParams(_Params):
    """`ClassEmbedder`: one learnt token a class; the last class stands for none."""

    n_classes: Annotated[int, Field(ge=2, le=1_000_000, strict=True)]
    embed_dim: Size
    key: str = "class"


_TEXT_ENCODERS = ("FrozenCLIPEmbedder", "FrozenOpenCLIPEmbedder")


def _named(target: str, *names: str) -> str:
    """The path of a class, if its name is one of these."""
    if target.rpartition(".")[2] not in names:
        raise ValueError(f"{target!r:.60}; expected {' or '.join(names)}")
    return target


class _ClassStage(_Params):
    target: str
    params: ClassParams

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        return _named(target, "ClassEmbedder", *_TEXT_ENCODERS)


class _TextStage(_Params):
    """A text encoder, which stays in the file: Stable Diffusion 1 and 2."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    target: str

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        return _named(target, *_TEXT_ENCODERS)


class _UNetStage(_Params):
    target: str
    params: UNetParams

    @field_validator("target")
    @classmethod
    def _known(cls, target: str) -> str:
        return _named(target, "UNetModel")


_Unconditional = Literal["__is_unconditional__"]


def _condition_kind(value: Any) -> str:
    """Which of the three a condition is, so that what is said of it is said of one of them."""
    if isinstance(value, str) and value == "__is_unconditional__":
        return "none"
    target = str(value.get("target", "")) if isinstance(value, dict) else ""
    return "text" if target.rpartition(".")[2] in _TEXT_ENCODERS else "class"


class LdmConfig(_Params):
    """`model.params` of an original configuration."""

    model_config = ConfigDict(frozen=True, extra="ignore")  # learning rates, monitors, what is logged

    unet_config: _UNetStage
    first_stage_config: FirstStage
    cond_stage_config: Annotated[
        Annotated[_ClassStage, Tag(_FORMS[0])]
        | Annotated[_TextStage, Tag(_FORMS[1])]
        | Annotated[_Unconditional, Tag(_FORMS[2])],
        Discriminator(_condition_kind),
    ]
    linear_start: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    linear_end: Annotated[float, Field(gt=0, lt=1)] = 2e-2
    timesteps: Annotated[int, Field(ge=1, le=100_000, strict=True)] = 1000
    beta_schedule: Literal["linear"] = "linear"
    parameterization: Literal["eps", "v"] = "eps"
    scale_factor: Annotated[float, Field(gt=0, lt=1e6)] = 1.0
    scale_by_std: bool = False

    @property
    def unet(self) -> UNetParams:
        """The denoiser's options."""
        return self.unet_config.params

    @property
    def classes(self) -> ClassParams | None:
        """The class embedder's options; None for an unconditional model."""
        return self.cond_stage_config.params if isinstance(self.cond_stage_config, _ClassStage) else None

    @property
    def text(self) -> bool:
        """Whether a text encoder gives the condition."""
        return isinstance(self.cond_stage_config, _TextStage)

    @model_validator(mode="after")
    def _consistent(self) -> "LdmConfig":
        if self.text:
            if not self.unet.use_spatial_transformer:
                raise ValueError("a text encoder and use_spatial_transformer go together")
            return self
        if self.parameterization == "v":
            raise ValueError("parameterization v is converted with a text encoder alone")
        if (self.classes is not None) != self.unet.use_spatial_transformer:
            raise ValueError("a class embedder and use_spatial_transformer go together")
        if self.classes is not None and self.classes.embed_dim != self.unet.context_dim:
            raise ValueError(f"embed_dim {self.classes.embed_dim} is not context_dim {self.unet.context_dim}")
        if self.first_stage_config.params.embed_dim != self.unet.in_channels:
            raise ValueError("the first stage's embed_dim is not the denoiser's in_channels")
        if self.unet.in_channels != self.unet.out_channels:
            raise ValueError("in_channels and out_channels of the denoiser differ")
        return self


def read_config(path: Path) -> LdmConfig:
    """Reads the YAML file of an original checkpoint.

    Raises:
        CaptureError: if it cannot be read, is no such configuration, or asks for what hqc does not convert.
    """
    data = _read_yaml(path)
    try:
        params = data["model"]["params"]
    except (KeyError, TypeError) as error:
        raise CaptureError(
            str(path), "has no model.params", "Give the configuration that belongs to the checkpoint."
        ) from error
    try:
        return LdmConfig.model_validate(params)
    except ValidationError as error:
        raise CaptureError(str(path), _first_problem(error), "Give the checkpoint's own configuration.") from error


def _read_yaml(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise CaptureError(str(path), f"cannot be read ({error.strerror})", "Check the path of --config.") from error
    if len(content) > _LARGEST_FILE:
        raise CaptureError(
            str(path), f"is larger than {_LARGEST_FILE // 1024} KiB", "Give the YAML configuration, not the weights."
        )
    try:
        return yaml.load(content, Loader=_PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError) as error:
        what = " ".join(str(error).split())
        raise CaptureError(str(path), f"is not plain YAML ({what[:200]})", "Give the YAML configuration.") from error


class _PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
    """Plain scalars, lists and mappings: no aliases (they can grow without bound), no deep nesting, no tags."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"line {self.peek_event().start_mark.line + 1} has an alias")
        if self._depth == _DEEPEST:
            raise yaml.YAMLError(f"is nested more than {_DEEPEST} deep")
        self._depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self._depth -= 1


def _first_problem(error: ValidationError) -> str:
    """The first problem in one line, with its place and, for an unknown option, the nearest known one."""
    found = error.errors(include_url=False)
    first = found[0]
    steps = [str(step) for step in first["loc"] if step not in _FORMS]
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        message = f"hqc does not know this option{_nearest_option(steps)}"
    elif first["type"] not in ("missing", "value_error"):
        message = f"{first['input']!r:.60}: {'expected a mapping' if first['type'] == 'model_type' else message}"
    more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
    return f"{'.'.join(['model.params', *steps])}: {message}{more}"


def _nearest_option(steps: list[str]) -> str:
    known: dict[str, type[BaseModel]] = {
        "unet_config": UNetParams,
        "first_stage_config": DecoderParams,
        "cond_stage_config": ClassParams,
    }
    near = difflib.get_close_matches(steps[-1], known[steps[0]].model_fields, n=1) if steps[0] in known else []
    return f" (nearest: {near[0]})" if near else ""
