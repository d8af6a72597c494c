"""Whatever `hqc serve` takes, as what a server draws with; an exported pipeline without torch in the process."""

from typing import TYPE_CHECKING

from hqc.errors import OptionError
from hqc.lite.opening import RUNTIME, is_exported_pipeline, open_pipeline
from hqc.paths import StrPath
from hqc.serving.app import Served

if TYPE_CHECKING:
    from hqc.runtimes import Runtime

__all__ = ["opened"]


def opened(
    model: str, runtime: "Runtime | None" = None, *, threads: int | None = None, cache: StrPath | None = None
) -> Served:
    """An exported pipeline, or an export, a program or `digits` in the pipeline around it; see `hqc.load`.

    Raises:
        OptionError: for a cache of an exported pipeline. HqcError: what cannot be opened, or not be asked for images.
    """
    if is_exported_pipeline(model):
        if cache is not None:
            kept = f"{model} is an exported pipeline, which keeps nothing there"
            raise OptionError("--cache-dir", kept, "Leave it out.")
        pipe = open_pipeline(model, runtime, threads)
        return Served(pipe, pipe.name, RUNTIME)
    from hqc.evaluation.needs import call_kind
    from hqc.runtimes import load
    from hqc.runtimes.model import describe
    from hqc.serving.pipelines import PipelineBackend

    found = describe(model)
    call_kind(found.pipeline, found.conditions)  # before the weights are read
    loaded = load(model, runtime=runtime, threads=threads, cache=cache)
    return Served(PipelineBackend(loaded.pipeline()), loaded.name, loaded.runtime)
