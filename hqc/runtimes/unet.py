"""A session as a drop-in for a diffusers pipeline's `.unet` or `.transformer`."""

import copy
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.families import plain_arguments
from hqc.errors import EvaluationError
from hqc.program import InputSpec
from hqc.runtimes.base import Session
from hqc.styles.record import attached_names, scale_input

__all__ = ["SessionUNet", "as_unet"]

log = logging.getLogger(__name__)


def as_unet(session: Session, unet_config: Mapping[str, Any], *, timesteps: Sequence[float] = ()) -> "SessionUNet":
    """An object with the call, `config`, `dtype` and `device` of the diffusers denoiser that was captured.

    unet_config: its configuration; `_class_name` decides the order of positional arguments (a UNet's without one).
    timesteps: the calibrated grid; a call outside its range uses the nearest row, which is noted in the log once.
    """
    return SessionUNet(session, unet_config, timesteps)


class SessionUNet(nn.Module):
    """Calls a session with diffusers' conventions. It has no parameters: the weights belong to the session.

    `.to(device)` and `.to(dtype)` say where inputs and outputs live and of what type they are, for a pipeline that
    asks; the session stays where it is and computes as it does. Threads may share a session, each with a drop-in of
    its own.
    """

    _placed: Tensor

    def __init__(self, session: Session, unet_config: Mapping[str, Any], timesteps: Sequence[float]) -> None:
        from diffusers.configuration_utils import FrozenDict

        super().__init__()
        self.session = session
        self.register_buffer("_placed", torch.empty(0), persistent=False)
        self.config = FrozenDict({**_config_of(session), **unet_config})
        self._range = (min(timesteps), max(timesteps)) if timesteps else None
        self._kind = str(unet_config.get("_class_name", ""))
        self._lora_scales: dict[str, Tensor | float] = {}
        if "projection_class_embeddings_input_dim" in unet_config:
            # The SDXL pipeline checks its time_ids against the width of this layer.
            width = unet_config["projection_class_embeddings_input_dim"]
            self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def inputs(self) -> Sequence[InputSpec]:
        """What the session takes, in order."""
        return self.session.inputs

    def set_lora_scales(self, scales: Mapping[str, Tensor | float]) -> None:
        """What attached LoRAs are scaled by from now on, by their names: one number, or one a sample of a call.

        Others keep theirs. A call may give `lora_scale_NAME=…` instead.

        Raises:
            EvaluationError: for a LoRA that the denoiser does not have.
        """
        known = attached_names(spec.name for spec in self.inputs)
        if unknown := [name for name in scales if name not in known]:
            found = f"is not attached; there are {', '.join(known)}" if known else "is not attached, and none is"
            raise EvaluationError(
                f"LoRA {unknown[0]}", found, "Attach it with `hqc attach-lora` or `hqc export --lora`."
            )
        self._lora_scales |= {scale_input(name): scale for name, scale in scales.items()}

    def styled(self, scales: Mapping[str, Tensor | float]) -> "SessionUNet":
        """Another denoiser over the same session, with scales of its own; see `set_lora_scales`."""
        other = copy.copy(self)
        other._lora_scales = dict(self._lora_scales)
        other.set_lora_scales(scales)
        return other

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and outputs, as pipelines make them; the session computes in its own."""
        return self._placed.dtype

    @property
    def device(self) -> torch.device:
        """Where inputs and outputs live."""
        return self._placed.device

    @contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        """What diffusers' transformers offer for caching between steps: nothing is cached here."""
        yield

    def forward(self, *arguments: Any, return_dict: bool = True, **options: Any) -> Any:
        """diffusers' call: (ε,) or an output with `.sample`, in the sample's dtype and on its device.

        Raises:
            EvaluationError: for options that the captured denoiser does not have, or inputs that do not fit.
        """
        try:
            given = plain_arguments(self._kind, arguments, options)
            sample, timestep = given.pop("sample"), given.pop("timestep")
        except (TypeError, KeyError) as error:
            raise EvaluationError(
                "denoiser", f"cannot be called like that ({error})", "Call it as diffusers does."
            ) from error
        given = {**self._lora_scales, **given}
        names = {spec.name for spec in self.session.inputs}
        if unknown := sorted(given.keys() - names):
            raise EvaluationError(
                f"option {unknown[0]!r}",
                "the denoiser was captured without it",
                "Leave it out, or capture the model with it.",
            )
        if "resolution" in names:  # PixArt's pipeline gives sizes at 1024 pixels alone
            given = {**_pixel_sizes(sample), **given}
        self._note_range(timestep)
        result = self.session(sample, timestep, **given).to(sample.device, sample.dtype)
        if not return_dict:
            return (result,)
        return _output_type(self._kind)(sample=result)

    def _note_range(self, timestep: Tensor | float) -> None:
        if self._range is None:
            return
        low, high = self._range
        values = torch.as_tensor(timestep, dtype=torch.float32)
        if bool((values < low).any() | (values > high).any()):
            log.warning(
                "timestep %g lies outside the calibrated range %g…%g: the nearest scales are used (noted once)",
                float(values.max() if bool((values > high).any()) else values.min()),
                low,
                high,
            )
            self._range = None


def _output_type(kind: str) -> Any:
    """What diffusers' own denoiser of a class returns; a UNet's without one."""
    from diffusers.models import modeling_outputs, unets

    if kind.endswith("Transformer2DModel"):
        return modeling_outputs.Transformer2DModelOutput
    return unets.unet_2d.UNet2DOutput if kind == "UNet2DModel" else unets.unet_2d_condition.UNet2DConditionOutput


_PIXART_ENLARGEMENT = 8


def _pixel_sizes(sample: Tensor) -> dict[str, Tensor]:
    """The sizes that PixArt is given, from its latents."""
    height, width = sample.shape[2:]
    pixels = torch.tensor([[height, width]], dtype=torch.float32) * _PIXART_ENLARGEMENT
    return {
        "resolution": pixels.expand(len(sample), -1),
        "aspect_ratio": torch.full((len(sample), 1), height / width),
    }


def _config_of(session: Session) -> dict[str, Any]:
    """What a pipeline asks a UNet's config for, from the shapes alone; the source's own config has precedence."""
    shapes = {spec.name: spec.shape for spec in session.inputs}
    config: dict[str, Any] = {}
    if len(shape := shapes.get("sample", ())) == 4:
        height, width = shape[2:]
        config |= {"in_channels": shape[1], "sample_size": height if height == width else [height, width]}
    if len(shape := shapes.get("condition", ())) == 3:
        config["cross_attention_dim"] = shape[2]
    return config
