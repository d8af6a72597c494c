"""The run that calibration watches: a program's graph node by node in float, its quantisers giving back what they read.

It is the denoiser of a trajectory, so that the trajectory is the float model's own.
"""

from typing import Any

import torch
from torch import Tensor, fx

from hqc.bounds import QUANTISER_ROLES
from hqc.errors import TrainingError
from hqc.program import Program
from hqc.running import node_failure
from hqc.sampling.task import call_arguments

__all__ = ["WatchedRun"]


class WatchedRun(fx.Interpreter):
    """A denoiser that is watched: `begin` hears of every call, `see` of every node with its value.

    timestep: of the call that goes on.
    """

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.extra_traceback = False  # errors keep their own words
        self.program, self.timestep = program, 0.0

    def __call__(self, sample: Tensor, timestep: Tensor, *conditions: Tensor | None) -> Tensor:
        times = timestep.reshape(-1).float()
        self.timestep = float(times[0])
        self.begin(sample, times)
        args = call_arguments(sample, times.expand(len(sample)), conditions, timed=self.program.has_timestep)
        with torch.no_grad():
            return self.run(*args)  # type: ignore[no-any-return]

    def begin(self, sample: Tensor, times: Tensor) -> None:
        """A call begins."""

    def see(self, node: fx.Node, value: Any) -> None:
        """A node has its value; what it has read is still there."""

    def run_node(self, n: fx.Node) -> Any:
        """As ever, but for quantisers."""
        try:
            value = self.env[n.args[0]] if n.meta.get("role") in QUANTISER_ROLES else super().run_node(n)  # type: ignore[index]
        except Exception as error:
            raise node_failure(n, error) from error
        self.see(n, value)
        return value

    def not_finite(self, where: str, timestep: float) -> TrainingError:
        """What to say of NaN or infinity."""
        return TrainingError(where, f"met NaN or infinity at timestep {timestep:g}", _because(self.program))


def _because(program: Program) -> str:
    """What to do about values that are not finite, by whether the weights are."""
    damaged = next((name for name, t in program.state.items() if bool(t.isnan().any())), None)
    if damaged is not None:
        return f"Its weight {damaged} has NaN: trace the model again, from a file that is whole."
    return "Sample and weights are finite, so the model overflows; --keep-float leaves the site float."
