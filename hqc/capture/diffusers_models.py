"""diffusers folders as sources: a pipeline's denoiser, or a UNet folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.source import Source, versions
from hqc.errors import CaptureError
from hqc.program import BATCH, InputSpec, Origin

__all__ = ["DiffusersUNet", "from_pipeline", "from_unet", "unet_source"]

_UNETS = ("UNet2DConditionModel", "UNet2DModel")


class DiffusersUNet(nn.Module):
    """diffusers' UNet as forward(sample, timestep[, condition]) -> tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            return self.unet(sample, timestep, return_dict=False)[0]  # type: ignore[no-any-return]
        return self.unet(sample, timestep, encoder_hidden_states=condition, return_dict=False)[0]  # type: ignore[no-any-return]


def from_pipeline(folder: Path, name: str, condition_length: int | None) -> Source:
    if not (folder / "unet" / "config.json").is_file():
        raise CaptureError(str(folder), "the pipeline has no unet/ folder", "Give a pipeline with a UNet denoiser.")
    length = condition_length or _condition_length(folder)
    return from_unet(folder / "unet", name, length, folder)


def _condition_length(folder: Path) -> int:
    """Tokens of the condition: the tokenizer's maximum if there is one, else the single token of a class embedder."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return 1
    try:
        return min(int(json.loads(path.read_text(encoding="utf-8")).get("model_max_length", 77)), 512)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(str(path), f"gives no length ({error})", "Check the file.") from error


def from_unet(folder: Path, name: str, condition_length: int, pipeline: Path | None) -> Source:
    import diffusers

    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        class_name = config.get("_class_name")
    except (ValueError, AttributeError) as error:
        raise CaptureError(str(folder / "config.json"), f"is not JSON ({error})", "Check the file.") from error
    if class_name not in _UNETS:
        raise CaptureError(
            str(folder), f"holds a {class_name}; expected {' or '.join(_UNETS)}", "Give the UNet's folder."
        )
    try:
        unet = getattr(diffusers, class_name).from_pretrained(folder, torch_dtype=torch.float32, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CaptureError(str(folder), f"diffusers could not load it ({error})", "Check the folder.") from error
    return unet_source(unet, name, condition_length, pipeline)


def unet_source(unet: Any, name: str, condition_length: int, pipeline: Path | None = None) -> Source:
    """A loaded diffusers UNet as a source; `condition_length` tokens where it is conditional."""
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = [InputSpec("sample", (BATCH, unet.config.in_channels, height, width)), InputSpec("timestep", (BATCH,))]
    kind = type(unet).__name__
    if kind == "UNet2DConditionModel":
        inputs.append(InputSpec("condition", (BATCH, condition_length, _width(unet.config.cross_attention_dim))))
    origin = Origin(
        source=name,
        kind=kind,
        pipeline=str(pipeline.resolve()) if pipeline is not None and name != "digits" else name if pipeline else "",
        unet_config=_plain_config(unet.config),
        versions=versions(),
    )
    return Source(DiffusersUNet(unet), tuple(inputs), origin, pipeline, prefix="unet.")


def _width(dimension: int | list[int]) -> int:
    return dimension if isinstance(dimension, int) else dimension[0]


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_name")}, default=str))  # type: ignore[no-any-return]
