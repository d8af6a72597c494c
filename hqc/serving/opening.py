"""Whatever `hqc serve` takes, as what a server draws with; an exported pipeline without torch in the process."""

import logging
from typing import TYPE_CHECKING

from hqc.errors import OptionError
from hqc.lite.opening import RUNTIME, is_exported_pipeline, open_pipeline
from hqc.machine import available_cores
from hqc.paths import StrPath
from hqc.serving.app import Served

if TYPE_CHECKING:
    from hqc.runtimes import Runtime
    from hqc.runtimes.base import Session

__all__ = ["divided", "opened", "warn_of_slow"]

log = logging.getLogger(__name__)

_SIDE_BY_SIDE = frozenset({RUNTIME})
_LANES = 2  # more are smaller shares of the batch: each row costs more
_FOR_SEVERAL = "Export it without --one-timestep to serve it."


def opened(
    model: str,
    runtime: "Runtime | None" = None,
    *,
    threads: int | None = None,
    lanes: int | None = None,
    cores: int | None = None,
    cache: StrPath | None = None,
    scheduler: str | None = None,
) -> Served:
    """An exported pipeline, or an export, a program or `digits` in the pipeline around it; see `hqc.load`.

    threads: of one call of the denoiser. lanes: calls side by side; where neither is given, ONNX Runtime has two lanes,
    and torch as many threads as a call of them. cores: that all of it may use; None is all that the process may.
    scheduler: instead of the pipeline's own, where a request names none.

    Raises:
        OptionError: for a cache of an exported pipeline, several lanes of a runtime that takes one call at a time, or a
            scheduler that cannot stand for the pipeline's.
        HqcError: what cannot be opened, or not be asked for images.
    """
    if is_exported_pipeline(model):
        lanes, threads = divided(RUNTIME, lanes, threads, cores)
        if cache is not None:
            kept = f"{model} is an exported pipeline, which keeps nothing there"
            raise OptionError("--cache-dir", kept, "Leave it out.")
        pipe = open_pipeline(model, runtime, threads or cores, scheduler)
        return Served(pipe, pipe.name, RUNTIME, lanes)
    from hqc.evaluation.needs import call_kind
    from hqc.runtimes import load
    from hqc.runtimes.model import describe, fitting_runtime
    from hqc.serving.pipelines import PipelineBackend
    from hqc.serving.schedulers import chosen_scheduler

    found = describe(model)
    call_kind(found.pipeline, found.conditions)  # before the weights are read
    lanes, threads = divided(runtime or fitting_runtime(model), lanes, threads, cores)
    loaded = load(model, runtime=runtime, threads=threads or cores, cache=cache)
    if lanes > 1:
        import torch

        torch.set_num_threads(threads or 1)  # decoders run in lanes too
    warn_of_slow(model, loaded.session)
    pipe = loaded.pipeline()
    pipe.scheduler = chosen_scheduler(pipe.scheduler, scheduler)
    return Served(PipelineBackend(pipe), loaded.name, loaded.runtime, lanes)


def warn_of_slow(model: str, session: "Session") -> None:
    """Says what keeps images of this session from sharing calls."""
    if getattr(session, "one_timestep", False):
        log.warning("%s takes one timestep a call: images at different steps share none. %s", model, _FOR_SEVERAL)
    if getattr(session, "batches", (1, None))[1] == 1:
        text = "%s takes one row a call: images share none, and guidance is two calls. %s"
        log.warning(text, model, f"Run `hqc build-engine {model} --max-batch 8 --force`.")


def divided(
    runtime: str, lanes: int | None = None, threads: int | None = None, cores: int | None = None
) -> tuple[int, int | None]:
    """Calls of the denoiser side by side, and the threads of one, where only some of it is asked for.

    cores: that they may use; None is all that the process may.

    Threads of a session are one pool for all lanes, whose own threads work as well: a core each with
    cores - lanes + 1.

    Raises:
        OptionError: for several lanes of a runtime that takes one call at a time.
    """
    cores = cores or available_cores()
    if lanes is None:
        lanes = min(_LANES, cores) if runtime in _SIDE_BY_SIDE and threads is None else 1
    if lanes > 1 and runtime not in _SIDE_BY_SIDE:
        raise OptionError(f"--lanes {lanes}", f"runtime {runtime} takes one call at a time", "Leave it out.")
    return lanes, max(1, cores - lanes + 1) if threads is None and lanes > 1 else threads
