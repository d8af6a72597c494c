"""Images of a backend by the engine, and how many of them shared its calls."""

from collections.abc import Sequence
from typing import Any

from hqc.serving.backend import Drawing
from hqc.serving.engine import Engine, Policy
from hqc.serving.pipelines import PipelineBackend

__all__ = ["drawn"]


class Watching:
    """How many images shared a call."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def step(self, images: int, rows: int, seconds: float) -> None:
        self.batches.append(images)

    def ended(self, *_: Any) -> None: ...


def drawn(
    backend: PipelineBackend,
    drawings: Sequence[Drawing],
    max_batch: int = 4,
    lanes: int = 1,
    policy: Policy = "continuous",
) -> tuple[list[Any], list[int]]:
    watching = Watching()
    engine = Engine(
        backend.denoise,
        lanes=lanes,
        max_batch=max_batch,
        max_queue=99,
        policy=policy,
        around=backend.around,
        observer=watching,
    )
    try:
        tickets = [engine.submit([lambda d=drawing: backend.begin(d)]) for drawing in drawings]  # type: ignore[misc]
        return [ticket.result.result(60)[0] for ticket in tickets], watching.batches
    finally:
        engine.close()
