"""`module:callable` as a source: any torch module with named example inputs."""

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hqc.capture.source import Source, versions
from hqc.errors import CaptureError
from hqc.program import BATCH, InputSpec, Origin

__all__ = ["from_callable"]


def from_callable(source: str) -> Source:
    """`module:callable` returns (nn.Module, {input name: example tensor [N, …]}) or a `Source`.

    Examples are float32, or int64 for labels: random ones are drawn from 0 to the largest in the example.
    The current folder is on the path, as for `python -m`: the `hqc` command alone would not look there.
    """
    module_name, name = source.split(":")
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.insert(0, os.getcwd())
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
    inputs = tuple(_input(source, key, tensor) for key, tensor in examples.items())
    return Source(module, inputs, Origin(source=source, kind=type(module).__name__, versions=versions()))


def _input(source: str, name: str, example: Tensor) -> InputSpec:
    """float32, or whole numbers from 0 to the largest of the example: labels."""
    if example.ndim == 0 or example.dtype not in (torch.float32, torch.int64):
        raise CaptureError(
            f"source {source!r}",
            f"input {name} is {example.dtype} with {example.ndim} axes; expected torch.float32 [N, …]",
            "Convert inside the module; labels may be torch.int64.",
        )
    shape = (BATCH, *example.shape[1:])
    if example.dtype == torch.float32:
        return InputSpec(name, shape)
    if name == "timestep" or example.numel() == 0 or int(example.min()) < 0:
        raise CaptureError(
            f"source {source!r}",
            f"input {name} is torch.int64; expected torch.float32, or labels from 0",
            "Convert inside the module.",
        )
    return InputSpec(name, shape, "int64", (0, int(example.max()) + 1))


def _named(examples: object) -> bool:
    return isinstance(examples, Mapping) and all(isinstance(tensor, Tensor) for tensor in examples.values())
