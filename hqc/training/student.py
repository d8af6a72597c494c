"""The quantised graph while it learns: its own copies of what is trained, the optimiser, the averages."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hqc.bits import asymmetric_top
from hqc.checkpoint import Checkpoint
from hqc.errors import ArtefactError
from hqc.processes import ALONE, Processes
from hqc.program import Program
from hqc.training.groups import Group, optimizer_of
from hqc.training.module import training_module
from hqc.training.taps import Tapped

__all__ = ["Student"]

_SMALLEST_SCALE = 1e-8
_MOMENTS = {"mean": "exp_avg", "square": "exp_avg_sq"}


class Student:
    """Trains the named tensors of a program, which itself stays as it is.

    samples: of a call, which decide what is cheaper to rotate. ema: the decay d of the averages a := d·a + (1-d)·p that
    are the result; 0 keeps none. taps: nodes whose values `denoise` keeps. processes: that learn together, each
    from its own samples.
    """

    def __init__(
        self,
        program: Program,
        names: Mapping[str, Group],
        samples: int,
        ema: float = 0.0,
        taps: Mapping[str, str] | None = None,
        processes: Processes = ALONE,
    ) -> None:
        self._program, self._ema, self._processes = program, ema, processes
        module = training_module(program, samples)
        self._parameters = {name: _own_parameter(module, name) for name in names}
        self._scales: list[Tensor] = [self._parameters[name] for name, group in names.items() if group.positive]
        tops = {name: _zero_top(program, name) for name in names}
        self._zeros = [(self._parameters[name], top) for name, top in tops.items() if top is not None]
        self._optimizer = optimizer_of(program, names, self._parameters)
        self._averages = {name: p.detach().clone() for name, p in self._parameters.items()} if ema else {}
        self.denoise = Tapped(module, taps or {})

    def learn(self, loss: Tensor, factor: float) -> None:
        """One update, with every rate times the factor."""
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._processes.add_gradients(list(self._parameters.values()))
        for group in self._optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
        self._optimizer.step()
        with torch.no_grad():
            if self._scales:
                torch._foreach_clamp_min_(self._scales, _SMALLEST_SCALE)
            for zero, top in self._zeros:
                zero.copy_(torch.minimum(zero.clamp_min(0), top))
            if self._averages:
                values: list[Tensor] = list(self._parameters.values())
                torch._foreach_lerp_(list(self._averages.values()), values, 1 - self._ema)

    def result(self) -> Program:
        """The program with what was learnt."""
        learnt = self._averages or self._parameters
        return self._program.evolve(
            state={**self._program.state, **{name: tensor.detach().clone() for name, tensor in learnt.items()}}
        )

    def snapshot(self, step: int, more: Mapping[str, Tensor]) -> Checkpoint:
        """Everything that the next update depends on. more: besides, by names of its own."""
        tensors = dict(more)
        for name, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            tensors[f"value/{name}"] = parameter.detach().clone()
            tensors |= {f"{kind}/{name}": moments[key].clone() for kind, key in _MOMENTS.items()}
        tensors |= {f"average/{name}": average.clone() for name, average in self._averages.items()}
        return Checkpoint(step, tensors)

    @torch.no_grad()
    def restore(self, saved: Checkpoint) -> None:
        """Goes back to a snapshot.

        Raises:
            ArtefactError: if it is of another program.
        """
        for name, parameter in self._parameters.items():
            parameter.copy_(_saved(saved, f"value/{name}", parameter))
            moments = {key: _saved(saved, f"{kind}/{name}", parameter).clone() for kind, key in _MOMENTS.items()}
            self._optimizer.state[parameter] = {"step": torch.tensor(float(saved.step)), **moments}
        for name, average in self._averages.items():
            average.copy_(_saved(saved, f"average/{name}", average))


def _zero_top(program: Program, name: str) -> Tensor | None:
    """The largest zero points that a tensor may hold, None for one that holds none: outside they would not learn."""
    site, _, leaf = name.rpartition(".")
    if leaf == "weight_zero" and program.plan[site].weight_mixed:
        return program.state[f"{site}.weight_top"]
    bits = {
        "activation_zero_table": program.plan[site].activation_bits,
        "weight_zero": program.plan[site].weight_bits,
    }.get(leaf)
    return torch.tensor(float(asymmetric_top(bits))) if bits else None


def _own_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """A trainable copy of one weight, so that the program's own tensors stay as they are."""
    path, leaf = name.rsplit(".", 1)
    parameter = nn.Parameter(module.get_parameter(name).detach().clone())
    setattr(module.get_submodule(path), leaf, parameter)
    return parameter


def _saved(saved: Checkpoint, name: str, parameter: Tensor) -> Tensor:
    tensor = saved.tensors.get(name)
    if tensor is None or tensor.shape != parameter.shape or tensor.dtype != parameter.dtype:
        raise ArtefactError("checkpoint", f"has no {name} as this program needs it", "Start again without --resume.")
    return tensor
