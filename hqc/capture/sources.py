"""What `hqc trace` accepts: `digits`, a diffusers pipeline or UNet folder, `arch:NAME`, or `module:callable`."""

import re
from pathlib import Path

from hqc.capture.architectures import ARCHITECTURE, from_architecture
from hqc.capture.diffusers_models import from_pipeline, from_unet
from hqc.capture.export_graph import capture_module
from hqc.capture.source import Source
from hqc.capture.user_callable import from_callable
from hqc.errors import CaptureError
from hqc.program import Program

__all__ = ["Source", "find_source", "trace"]


def trace(source: str | Source, *, condition_length: int | None = None) -> Program:
    """Captures a source into a Program; `source` as `find_source` takes it, or a `Source`.

    Raises:
        CaptureError: if the source is unknown or cannot be captured.
    """
    found = source if isinstance(source, Source) else find_source(source, condition_length=condition_length)
    program = capture_module(found.module, found.inputs, found.origin)
    return _without_prefix(program, found.prefix) if found.prefix else program


def _without_prefix(program: Program, prefix: str) -> Program:
    for node in program.graph.nodes:
        if node.op == "get_attr":
            node.target = str(node.target).removeprefix(prefix)
            node.name = str(node.target).replace(".", "_")
        if "site" in node.meta:
            node.meta["site"] = node.meta["site"].removeprefix(prefix)
    return program.evolve(state={k.removeprefix(prefix): v for k, v in program.state.items()})


def find_source(source: str, *, condition_length: int | None = None) -> Source:
    """Resolves what the user typed; see the module's first line."""
    if source == "digits":
        from hqc.models import digits_path

        return from_pipeline(digits_path(), "digits", condition_length)
    if source.startswith(ARCHITECTURE):
        return from_architecture(source, condition_length=condition_length)
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        return from_pipeline(folder, str(folder.resolve()), condition_length)
    if (folder / "config.json").is_file():
        return from_unet(folder, str(folder.resolve()), condition_length or 77, None)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source):
        return from_callable(source)
    what = "a folder without model_index.json or config.json" if folder.is_dir() else "nothing that hqc can trace"
    raise CaptureError(
        f"source {source!r}",
        f"is {what}",
        "Give `digits`, a diffusers pipeline or UNet folder, `arch:NAME`, or `module:callable`.",
    )
