"""Activation scale tables by search along a float trajectory.

For every site, every quantised part of an attention, and every timestep the scale minimises the error of its
quantiser over candidate clip ranges (`searches`), on its own input (rotated where the plan says so). The quantisers are
bypassed while observing, so the trajectory is the float model's own.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from hqc.attentions import part_name
from hqc.bounds import VALUE_ROLES
from hqc.calibration.searches import Search, activation_search, some_values
from hqc.calibration.watching import WatchedRun
from hqc.errors import TrainingError
from hqc.memory import require_call_memory
from hqc.passes.insert_attention_qdq import ATTENTION_GRID
from hqc.passes.insert_qdq import GRID
from hqc.program import Program, Stage
from hqc.sampling import Work
from hqc.sampling.task import Denoise
from hqc.steps import check_options

__all__ = ["CalibrateActivations", "calibrate", "nearest_rows"]

_ONE_ROW = torch.zeros(1)


@dataclass(frozen=True)
class CalibrateActivations:
    """Fills the activation scale tables along the float model's own trajectory.

    `samples` images are sampled in one go; per site and timestep the scale minimises the squared quantisation error
    over `candidates` clip ranges, or another `power` of it (2.4 is EfficientDM's). Asymmetric sites get their zero
    points too. Dynamic ranges have none to be found. seed: of the noise and the conditions.
    """

    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    candidates: Annotated[int, Field(ge=2, le=1000)] = 60
    power: Annotated[float, Field(ge=1, le=8)] = 2.0
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def check(self, program: Program, work: Work) -> None:
        """All images are one batch, twice as large with guidance; the quantised program is a second copy.

        Raises:
            MemoryShortError: if that does not fit.
        """
        if work.observe is not None:
            return
        what, do = f"calibrating on {self.samples} images", "Take fewer calibration images (--calib-size)"
        require_call_memory(what, program, self.samples * work.halves(), do)

    def run(self, program: Program, work: Work) -> Program:
        """The program with other activation scales.

        Raises:
            TrainingError: see `calibrate`.
        """
        loop = work.loop("calibrating", self.samples, self.seed)
        return calibrate(program, loop, candidates=self.candidates, power=self.power)

    def cost(self, program: Program, work: Work) -> float:
        """One trajectory of every image."""
        return float(work.evaluations(self.samples))


class _Observer(WatchedRun):
    """Feeds every activation quantiser's input to the search."""

    def __init__(self, program: Program, candidates: int, power: float) -> None:
        super().__init__(program)
        self._candidates, self._power = candidates, power
        self.searches: dict[tuple[str, int], Search] = {}
        self._originals: dict[fx.Node, list[Tensor]] = {}

    def begin(self, sample: Tensor, times: Tensor) -> None:
        if bool((times != times[0]).any()):
            raise TrainingError(
                "calibration", "one call mixes timesteps", "Call the model with one timestep at a time."
            )
        if not bool(sample.isfinite().all()):
            raise TrainingError(
                "calibration",
                f"the model is given NaN or infinity at timestep {self.timestep:g}: sampling gave them",
                "Check the scheduler that the forward loop steps with (prediction_type, rescale_betas_zero_snr).",
            )

    def run_node(self, n: fx.Node) -> Any:
        role = n.meta.get("role")
        if role == "rotation_back":  # of a tensor that nothing has quantised: what was rotated
            return self._original(n.args[0].args[0])  # type: ignore[union-attr, arg-type]
        if role == "rotation":
            self._originals[n] = [self.env[n.args[0]]] * _rotated_back(n)  # type: ignore[index]
        return super().run_node(n)

    def _original(self, rotation: fx.Node) -> Tensor:
        """What a rotation was applied to, for each of its readers once."""
        waiting = self._originals[rotation]
        x = waiting.pop()
        if not waiting:
            del self._originals[rotation]
        return x

    def see(self, node: fx.Node, value: Any) -> None:
        if not _has_table(self.program, node):
            return
        low, high = (float(bound) for bound in value.aminmax())
        site, grid = str(node.meta["site"]), _grid(self.program, node)
        row = int((self.timestep - grid).abs().argmin())
        if not math.isfinite(max(-low, high)):
            raise self.not_finite(f"calibration at {site}", float(grid[row]))
        if (site, row) not in self.searches:
            bits, symmetric = _bits(self.program, node)
            self.searches[site, row] = activation_search(bits, symmetric, self._candidates, self._power)
        self.searches[site, row].add(some_values(value), low, high)


def nearest_rows(visited: Sequence[int], count: int) -> list[int]:
    """For each of so many rows of a table the nearest one that was visited, the earlier of two.

    >>> nearest_rows([1, 4], 6)
    [1, 1, 1, 4, 4, 4]
    """
    return [min(visited, key=lambda v, r=row: (abs(v - r), v)) for row in range(count)]  # type: ignore[misc]


def _has_table(program: Program, node: fx.Node) -> bool:
    """Whether a node quantises with scales that calibration finds; those of dynamic ranges nobody stores."""
    return node.meta.get("role") in VALUE_ROLES and f"{node.meta['site']}.activation_scale_table" in program.state


def _grid(program: Program, quantiser: fx.Node) -> Tensor:
    """The timesteps that a quantiser's rows are for."""
    return program.state.get(GRID if quantiser.meta["role"] == "activation_quantizer" else ATTENTION_GRID, _ONE_ROW)


def _bits(program: Program, quantiser: fx.Node) -> tuple[int, bool]:
    """The bits of a quantiser's codes, and whether they are symmetric; those of a softmax are 0 … 2ⁿ-1.

    A softmax has no value below 0, so that the search of asymmetric ranges gives it the zero point 0.
    """
    site, role = quantiser.meta["site"], quantiser.meta["role"]
    if role == "softmax_quantizer":
        return int(quantiser.args[3]), False  # type: ignore[arg-type]
    if role == "activation_quantizer":
        return program.plan[site].activation_bits or 8, program.plan[site].activation_symmetric
    plan = next(one for one in program.plan.attentions if str(site).startswith(part_name(one.name, "")))
    return plan.operand_bits or 8, plan.operands_symmetric


def _rotated_back(rotation: fx.Node) -> int:
    """How many of its quantised values are rotated back: none where the weight is rotated too."""
    return sum(any(user.meta.get("role") == "rotation_back" for user in reader.users) for reader in rotation.users)


def calibrate(
    program: Program, forward_loop: Callable[[Denoise], None], *, candidates: int = 60, power: float = 2.0
) -> Program:
    """Fills the activation scale tables of a quantised program.

    forward_loop(model) runs `model(sample, timestep, *conditions)` on whatever it likes, one timestep a call; every
    timestep is booked under its nearest row of the grid. Rows that were never visited take the nearest visited row.

    Raises:
        TrainingError: for NaN or infinity (naming site and timestep), or if the model was never called.
    """
    quantisers = [node for node in program.graph.nodes if _has_table(program, node)]
    if program.plan.quantised and not quantisers:  # every range is dynamic
        return program
    observer = _Observer(program, candidates, power)
    forward_loop(observer)
    state = dict(program.state)
    if not observer.searches and quantisers:
        raise TrainingError(
            "calibration", "the forward loop never called the model", "Call model(sample, timestep, …)."
        )
    for quantiser in quantisers:
        site = str(quantiser.meta["site"])
        name, visited = f"{site}.activation_scale_table", [row for one, row in observer.searches if one == site]
        found = [observer.searches[site, row] for row in nearest_rows(visited, len(state[name]))]
        state[name] = torch.tensor([search.scale for search in found])
        if f"{site}.activation_zero_table" in state:
            state[f"{site}.activation_zero_table"] = torch.tensor([search.zero for search in found])
    return program.evolve(state=state)
