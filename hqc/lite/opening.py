"""Exported pipelines by their folder: whatever is done with one is done without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqc.errors import OptionError

if TYPE_CHECKING:
    from hqc.lite import LitePipeline

__all__ = ["RUNTIME", "is_exported_pipeline", "open_pipeline"]

RUNTIME = "onnxruntime"


def is_exported_pipeline(model: str) -> bool:
    """Whether a path is a folder that `hqc export --pipeline` wrote."""
    from hqc.manifests import PIPELINE_KIND, kind_of

    return kind_of(Path(model)) == PIPELINE_KIND


def open_pipeline(
    model: str, runtime: Any = None, threads: int | None = None, scheduler: str | None = None
) -> "LitePipeline":
    """Opens one; scheduler: a name, instead of its own.

    Raises:
        OptionError: for another runtime. ArtefactError, EvaluationError: see `LitePipeline`.
    """
    from hqc.lite import LitePipeline
    from hqc.stages import doing

    if runtime not in (None, RUNTIME):
        raise OptionError(
            f"--runtime {runtime}", f"{model} is an exported pipeline: {RUNTIME} runs it", "Leave it out."
        )
    with doing(f"loading {model}"):
        return LitePipeline(model, threads=threads, scheduler=scheduler)
