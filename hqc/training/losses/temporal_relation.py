"""Relations: which places of an image are alike, in the features of a block averaged over neighbouring timesteps."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, fx

from hqc.errors import PlanError
from hqc.program import Program, aten, is_op
from hqc.training.losses.seen import Seen
from hqc.training.losses.term import Term

__all__ = ["TemporalRelation", "places_of", "relation_loss", "tapped_block", "unit_features"]

_CHUNK_VALUES = 2**22
_PASSED_ROLES = ("activation_quantizer", "rotation", "rotation_back", "smoothing", "shift")
_PASSED = (aten.group_norm.default, aten.layer_norm.default, aten.rms_norm.default, aten.silu.default)


@dataclass(frozen=True)
class TemporalRelation(Term):
    """weight·Σ_n Σ_i KL(softmax_j S_ij ‖ softmax_j Ŝ_ij), S_ij = cosine of the features at places i and j.

    scope: path of the block whose output the features are, empty for the last one, which the norm in front of the last
    layer reads. window: neighbouring steps of the trajectory whose features are averaged; the gradient goes through
    the present one. Source: MPQ-DM (arXiv 2412.11549), whose released code detaches the student and has no gradient.
    """

    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0
    window: Annotated[int, Field(ge=1, le=64)] = 2  # type: ignore[misc]  # an option here
    scope: str = ""

    in_order: ClassVar[bool] = True

    def taps(self, program: Program) -> Mapping[str, str]:
        """The node that gives the features.

        Raises:
            PlanError: if there is no such block, or its output is neither an image nor tokens.
        """
        return {self._key: tapped_block(program, self.scope, "temporal_relation")}

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        found = relation_loss(self._features(student), self._features(teacher).detach())
        factor = self.weight if teacher.weight is None else self.weight * teacher.weight
        return found * factor

    @property
    def _key(self) -> str:
        return f"block {self.scope}"

    def _features(self, seen: Seen) -> Tensor:
        """[N, places, C], the mean over the window."""
        before = seen.before[len(seen.before) - (self.window - 1) :] if self.window > 1 else ()
        values = [seen.taps[self._key], *(one[self._key] for one in before)]
        return places_of(values[0] if len(values) == 1 else torch.stack(values).mean(0))


def tapped_block(program: Program, scope: str, loss: str) -> str:
    """The node of the output of a block, the last one without a scope.

    Raises:
        PlanError: naming the loss, if there is no such block, or its output is neither an image nor tokens.
    """
    node = _last_of(program, scope) if scope else _before_last_layer(program)
    where = f"{loss} of {scope or 'the last block'}"
    if node is None:
        raise PlanError(where, "the program has no such block", "Name one by its path, as up_blocks.2.")
    if len(shape := node.meta.get("shape", ())) not in (3, 4):
        raise PlanError(where, f"its output is {list(shape)}, no image or tokens", "Name another block as scope.")
    return node.name


def places_of(x: Tensor) -> Tensor:
    """An image [N, C, H, W], or tokens [N, L, C], as [N, places, C]."""
    return x.flatten(2).transpose(1, 2) if x.ndim == 4 else x


def relation_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ KL(softmax S ‖ softmax Ŝ) over the rows of the relations of features [N, places, C]; gradients to the student.

    Rows are computed some at a time, and their gradients with them: a relation [places, places] is never held whole.
    """
    return _Relation.apply(unit_features(student), unit_features(teacher))  # type: ignore[no-any-return,no-untyped-call]


def unit_features(features: Tensor) -> Tensor:
    """Features […, C] of length one."""
    return torch.nn.functional.normalize(features, dim=-1)


class _Relation(torch.autograd.Function):
    """Σ_i KL(p_i ‖ p̂_i) with p = softmax(F·Fᵀ) by row: G = ∂/∂Ŝ = p̂ - p, ∂/∂F̂ = (G + Gᵀ)·F̂."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:  # type: ignore[override]
        samples, places, _ = student.shape
        rows = max(1, _CHUNK_VALUES // max(1, samples * places))
        total, gradient = student.new_zeros(()), torch.zeros_like(student)
        for start in range(0, places, rows):
            some = slice(start, start + rows)
            wanted = (teacher[:, some] @ teacher.transpose(1, 2)).log_softmax(-1)
            found = (student[:, some] @ student.transpose(1, 2)).log_softmax(-1)
            p = wanted.exp()
            total = total + (p * (wanted - found)).sum()
            slope = found.exp_().sub_(p)
            gradient[:, some] += slope @ student
            gradient += slope.transpose(1, 2) @ student[:, some]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None


def _last_of(program: Program, scope: str) -> fx.Node | None:
    """The last value that a block makes."""
    inside = [n for n in program.graph.nodes if _within(str(n.meta.get("scope", "")), scope) and n.op != "get_attr"]
    return inside[-1] if inside else None


def _within(path: str, scope: str) -> bool:
    return path == scope or path.startswith(f"{scope}.")


def _before_last_layer(program: Program) -> fx.Node | None:
    """What the norm and the activation in front of the last layer read, through its quantiser."""
    layers: Sequence[tuple[str, fx.Node]] = list(program.sites())
    if not layers:
        return None
    node: Any = layers[-1][1].args[0]
    while node.meta.get("role") in _PASSED_ROLES or is_op(node, *_PASSED):
        node = node.args[0]
    return node if node.op == "call_function" else None
