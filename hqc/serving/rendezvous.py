"""Any diffusers pipeline as steps of the engine: its call stops wherever it calls the denoiser.

Every image runs the pipeline's own call in a greenlet. In place of the denoiser's session there is a `Rendezvous`,
which hands what it is called with to the engine and waits for its rows of the output; decoders and text encoders are
handed to it whole, as tasks (`apart`). So every scheduler, guidance and
prompt is diffusers' own, and only the denoiser's rows are shared.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from hqc.errors import RuntimeMissingError
from hqc.program import InputSpec
from hqc.runtimes.base import Session, named_inputs
from hqc.sampling.task import TORCH_GENERATOR
from hqc.serving.rows import RowRule, called
from hqc.serving.split import Split
from hqc.serving.tickets import Call, Task

try:
    from greenlet import getcurrent, greenlet
except ModuleNotFoundError as error:
    raise RuntimeMissingError("hqc serve", "greenlet is not installed", "pip install 'hqc[serve]'") from error

__all__ = ["PipelineSteps", "Rendezvous", "apart", "together", "under_way"]


class Rendezvous:
    """A session that lets the engine call the denoiser; outside of an image's greenlet it calls it itself."""

    def __init__(self, session: Session) -> None:
        self.session = session

    @property
    def name(self) -> str:
        """The runtime's name."""
        return self.session.name

    @property
    def inputs(self) -> tuple[InputSpec, ...]:
        """What the denoiser takes, in order."""
        return self.session.inputs

    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        engine = getcurrent().parent
        if engine is None:
            return self.session(**given)
        output: Tensor = engine.switch(Call(given, len(sample)))
        return output


_UNDER_WAY: ContextVar[bool] = ContextVar("under_way", default=False)  # every greenlet has a context of its own


@contextmanager
def under_way() -> Iterator[None]:
    """Inside, what is done `apart` is not an image's last."""
    before = _UNDER_WAY.set(True)
    try:
        yield
    finally:
        _UNDER_WAY.reset(before)


def apart(function: Callable[..., Any], *, last: bool = False) -> Callable[..., Any]:
    """The same function, which an image's greenlet has the engine run by itself, beside the calls of other images.

    last: no call of the denoiser follows, outside of `under_way`.
    """

    def run(*arguments: Any, **options: Any) -> Any:
        with torch.inference_mode():  # it is a thread's own
            return function(*arguments, **options)

    def handed_on(*arguments: Any, **options: Any) -> Any:
        engine = getcurrent().parent
        if engine is None:
            return function(*arguments, **options)
        return engine.switch(Task(lambda: run(*arguments, **options), last and not _UNDER_WAY.get()))

    return handed_on


class PipelineSteps(Generator[Call | Task, Any, Any]):
    """One image: `draw` runs up to its next call of a `Rendezvous` at every step, and its result is the image.

    torch's global generator is the image's own while it runs, seeded with `seed`: what a scheduler draws without being
    given a generator does not depend on the images beside it either.
    """

    def __init__(self, draw: Callable[[], Any], seed: int) -> None:
        self._greenlet = greenlet(draw)
        self._random = torch.Generator().manual_seed(seed).get_state()

    def send(self, value: Any) -> Call | Task:
        """On with what was asked for, None at the start; StopIteration has the image."""
        return self._on(self._greenlet.switch, *((value,) if self._greenlet else ()))

    def throw(self, error: Any, *_: Any) -> Call | Task:
        """On with a failure of what was asked for."""
        return self._on(self._greenlet.throw, error)

    def close(self) -> None:
        """Leaves the image where it is."""
        if self._greenlet:  # begun and not ended
            self._on_random(self._greenlet.throw)

    def _on(self, go: Callable[..., Any], *values: Any) -> Call | Task:
        found = self._on_random(go, *values)
        if self._greenlet.dead:
            raise StopIteration(found)
        assert isinstance(found, Call | Task)
        return found

    def _on_random(self, go: Callable[..., Any], *values: Any) -> Any:
        with TORCH_GENERATOR:
            outside = torch.get_rng_state()
            torch.set_rng_state(self._random)
            try:
                return go(*values)
            finally:
                self._random = torch.get_rng_state()
                torch.set_rng_state(outside)


def together(session: Session, calls: Sequence[Call], split: Split, at_once: int = 1) -> list[Tensor]:
    """The outputs of several calls: one call of the session for all that share what has no batch axis.

    Rows stand behind one another in the order of the calls. Inputs without a batch axis (Flux's image ids) are one for
    all rows of a call, so that images which differ in them, as in their size, are called in groups. at_once: so many
    calls of the session side by side, each with a part of the rows. A session that takes fewer rows at once than there
    are, as an engine, is called one time after the other (`RowRule`).
    """
    batched = {spec.name for spec in session.inputs if spec.batched}
    rule = RowRule.of(session)

    def run(**inputs: Tensor) -> Tensor:
        with torch.inference_mode():  # it is a thread's own
            return called(session, inputs, batched, len(inputs["sample"]), rule)

    outputs: dict[int, Tensor] = {}
    for group in _groups(session.inputs, calls):
        members = [calls[index].inputs for index in group]
        joined = {
            name: torch.cat([inputs[name] for inputs in members]) if name in batched else members[0][name]
            for name in (spec.name for spec in session.inputs)
        }
        rows = [calls[index].rows for index in group]
        found = torch.cat(split(run, joined, batched, sum(rows), at_once))
        outputs.update(zip(group, torch.split(found, rows), strict=True))
    return [outputs[index] for index in range(len(calls))]


def _groups(inputs: Sequence[InputSpec], calls: Sequence[Call]) -> list[list[int]]:
    shared = [spec.name for spec in inputs if not spec.batched]
    groups: list[list[int]] = []
    for index, call in enumerate(calls):
        for group in groups:
            first = calls[group[0]].inputs
            if all(torch.equal(first[name], call.inputs[name]) for name in shared):
                group.append(index)
                break
        else:
            groups.append([index])
    return groups
