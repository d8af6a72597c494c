"""What `hqc trace` accepts: `digits`, a diffusers pipeline or UNet folder, or `module:callable`."""

import importlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.export_graph import capture_module
from hqc.errors import CaptureError
from hqc.program import BATCH, InputSpec, Origin, Program

__all__ = ["Source", "find_source", "trace"]

_UNETS = ("UNet2DConditionModel", "UNet2DModel")


@dataclass(frozen=True)
class Source:
    """A denoiser ready for capture: module(*inputs), its inputs, its origin, the pipeline folder around it."""

    module: nn.Module
    inputs: tuple[InputSpec, ...]
    origin: Origin
    pipeline: Path | None = None


class _DiffusersUNet(nn.Module):
    """diffusers' UNet as forward(sample, timestep[, condition]) -> tensor."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor | None = None) -> Tensor:
        if condition is None:
            return self.unet(sample, timestep, return_dict=False)[0]  # type: ignore[no-any-return]
        return self.unet(sample, timestep, encoder_hidden_states=condition, return_dict=False)[0]  # type: ignore[no-any-return]


def trace(source: str | Source, *, condition_length: int | None = None) -> Program:
    """Captures a source into a Program: `digits`, a diffusers folder, `module:callable`, or a `Source`.

    Raises:
        CaptureError: if the source is unknown or cannot be captured.
    """
    found = source if isinstance(source, Source) else find_source(source, condition_length=condition_length)
    program = capture_module(found.module, found.inputs, found.origin)
    # The wrapper around a diffusers UNet is not part of the names that users know.
    return _without_prefix(program, "unet.") if isinstance(found.module, _DiffusersUNet) else program


def _without_prefix(program: Program, prefix: str) -> Program:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(prefix)
            node.name = str(node.target).replace(".", "_")
        if "site" in node.meta:
            node.meta["site"] = node.meta["site"].removeprefix(prefix)
    return program.evolve(state={k.removeprefix(prefix): v for k, v in program.state.items()})


def find_source(source: str, *, condition_length: int | None = None) -> Source:
    """Resolves what the user typed; see `trace`."""
    if source == "digits":
        from hqc.models import digits_path

        return _from_pipeline(digits_path(), "digits", condition_length)
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return _from_pipeline(folder, str(folder.resolve()), condition_length)
    if (folder / "config.json").is_file():
        return _from_unet(folder, str(folder.resolve()), condition_length or 77, None)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source):
        return _from_callable(source)
    what = "a folder without model_index.json or config.json" if folder.is_dir() else "nothing that hqc can trace"
    raise CaptureError(
        f"source {source!r}",
        f"is {what}",
        "Give `digits`, a diffusers pipeline or UNet folder, or `module:callable`.",
    )


def _from_pipeline(folder: Path, name: str, condition_length: int | None) -> Source:
    if not (folder / "unet" / "config.json").is_file():
        raise CaptureError(str(folder), "the pipeline has no unet/ folder", "Give a pipeline with a UNet denoiser.")
    length = condition_length or _condition_length(folder)
    return _from_unet(folder / "unet", name, length, folder)


def _condition_length(folder: Path) -> int:
    """Tokens of the condition: the tokenizer's maximum if there is one, else the single token of a class embedder."""
    path = folder / "tokenizer" / "tokenizer_config.json"
    if not path.is_file():
        return 1
    try:
        return min(int(json.loads(path.read_text(encoding="utf-8")).get("model_max_length", 77)), 512)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise CaptureError(str(path), f"gives no length ({error})", "Check the file.") from error


def _from_unet(folder: Path, name: str, condition_length: int, pipeline: Path | None) -> Source:
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
    size = unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    inputs = [InputSpec("sample", (BATCH, unet.config.in_channels, height, width)), InputSpec("timestep", (BATCH,))]
    if class_name == "UNet2DConditionModel":
        inputs.append(InputSpec("condition", (BATCH, condition_length, _width(unet.config.cross_attention_dim))))
    origin = Origin(
        source=name,
        kind=class_name,
        pipeline=str(pipeline.resolve()) if pipeline is not None and name != "digits" else name,
        unet_config=_plain_config(unet.config),
        versions=_versions(),
    )
    return Source(_DiffusersUNet(unet), tuple(inputs), origin, pipeline)


def _width(dimension: int | list[int]) -> int:
    return dimension if isinstance(dimension, int) else dimension[0]


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps({k: v for k, v in dict(config).items() if not k.startswith("_name")}, default=str))  # type: ignore[no-any-return]


def _from_callable(source: str) -> Source:
    """`module:callable` returns (nn.Module, {input name: example tensor [N, …]}) or a `Source`."""
    module_name, name = source.split(":")
    try:
        function: Callable[[], Any] = getattr(importlib.import_module(module_name), name)
    except Exception as error:  # the module is the user's: importing it may raise anything
        raise CaptureError(
            f"source {source!r}", f"cannot be imported ({type(error).__name__}: {error})", "Check the name."
        ) from error
    if not callable(function):
        raise CaptureError(f"source {source!r}", f"is a {type(function).__name__}", "Give a callable.")
    try:
        result = function()
    except Exception as error:
        raise CaptureError(
            f"source {source!r}", f"raised {type(error).__name__}: {error}", "Call it in Python to see where."
        ) from error
    if isinstance(result, Source):
        return result
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module) and _named(result[1])):
        raise CaptureError(
            f"source {source!r}",
            f"returned {type(result).__name__}; expected (module, {{input name: example tensor}})",
            "Return the module with named example inputs whose first axis is the batch; name one `timestep`.",
        )
    module, examples = result
    if "timestep" not in examples:
        raise CaptureError(
            f"source {source!r}",
            f"has inputs {', '.join(examples)}; expected one named timestep",
            "Name the input that holds each sample's timestep [N] `timestep`.",
        )
    for key, tensor in examples.items():
        if tensor.dtype != torch.float32 or tensor.ndim == 0:
            raise CaptureError(
                f"source {source!r}",
                f"input {key} is {tensor.dtype} with {tensor.ndim} axes; expected torch.float32 [N, …]",
                "Convert inside the module, for example labels with `.long()`.",
            )
    inputs = tuple(InputSpec(key, (BATCH, *tensor.shape[1:])) for key, tensor in examples.items())
    return Source(module, inputs, Origin(source=source, kind=type(module).__name__, versions=_versions()))


def _named(examples: object) -> bool:
    return isinstance(examples, Mapping) and all(isinstance(tensor, Tensor) for tensor in examples.values())


def _versions() -> dict[str, str]:
    found = {}
    for package in ("hqc", "torch", "diffusers", "onnx", "onnxruntime"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
