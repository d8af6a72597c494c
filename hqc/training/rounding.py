"""Rounding that is learnt: every weight goes to the code below it or above it, whichever serves the block.

    h(α) = clip(1.2·σ(α) - 0.1, 0, 1)                     the share of the upper code, 0 and 1 within reach
    W(α) = s·clip(⌊W/s⌋ + h(α), low, high)                while it learns
    Σ (1 - |2h - 1|^β)                                    0 where every h is 0 or 1; β falls while it learns
    W    = s·clip(⌊W/s⌋ + [h ≥ ½], low, high)             afterwards: its own quantiser gives exactly these codes

Source: AdaRound (arXiv 2004.10568), as BRECQ (arXiv 2102.05426) and Q-Diffusion (arXiv 2302.04304) use it.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from hqc.bounds import bounds_of
from hqc.ops.fake_quantize import per_first_axis
from hqc.program import Program

__all__ = ["LearntRounding", "SoftRounding", "annealed", "coded", "restored_weights", "undecided", "weight_name"]

_STRETCH, _OFFSET = 1.2, 0.1
_BETA = (20.0, 2.0)


class SoftRounding:
    """One weight while its codes are learnt.

    weight [O, …]; scale [O]; low, high: the least and the largest code, numbers or [O]. begun: the codes of an earlier
    round, which it goes on from: h starts half-way between the weight's own share and theirs.
    """

    def __init__(
        self, weight: Tensor, scale: Tensor, low: Tensor | int, high: Tensor | int, begun: Tensor | None = None
    ) -> None:
        self._levels = weight * per_first_axis(scale.reciprocal(), weight)
        self._below, self._scale = self._levels.floor(), per_first_axis(scale, weight)
        self._low, self._high = (_bound(bound, weight) for bound in (low, high))
        share, self._begun = self._levels - self._below, begun
        if begun is not None:
            share = (share + (begun - self._below).clamp(0, 1)) / 2
        self.alpha = nn.Parameter(-torch.log(_STRETCH / (share + _OFFSET) - 1))

    def share(self) -> Tensor:
        """h(α), of the weight's shape."""
        return (_STRETCH * torch.sigmoid(self.alpha) - _OFFSET).clamp(0, 1)

    def weight(self, share: Tensor) -> Tensor:
        """The weight between its codes, for these shares."""
        return torch.clamp(self._below + share, self._low, self._high) * self._scale

    @torch.no_grad()
    def codes(self) -> Tensor:
        """What it comes to: int8, of the weight's shape."""
        return torch.clamp(self._below + (self.share() >= 0.5), self._low, self._high).to(torch.int8)

    @torch.no_grad()
    def nearest(self) -> Tensor:
        """The codes of rounding to nearest."""
        return torch.clamp(self._levels.round(), self._low, self._high).to(torch.int8)

    def first(self) -> Tensor:
        """The codes that it begins with: those of an earlier round, or of rounding to nearest."""
        return self.nearest() if self._begun is None else self._begun


def _bound(bound: Tensor | int, weight: Tensor) -> Tensor:
    return per_first_axis(bound, weight) if isinstance(bound, Tensor) else torch.tensor(float(bound))


def coded(codes: Tensor, scale: Tensor) -> Tensor:
    """The weight of these codes: rounding it with its scale gives them again."""
    return codes.to(torch.float32) * per_first_axis(scale, codes)


def undecided(share: Tensor, beta: float) -> Tensor:
    """Σ (1 - |2h - 1|^β), a scalar."""
    return share.numel() - (2 * share - 1).abs().pow(beta).sum()


def annealed(done: float, warm_up: float, start: float, end: float) -> float | None:
    """β after a share of the steps: from `start` down to `end` in a line; None in the share of them before that."""
    if done < warm_up:
        return None
    return end + (start - end) * (1 - (done - warm_up) / (1 - warm_up))


def weight_name(quantiser: fx.Node) -> str:
    """The tensor that a weight quantiser reads."""
    source: Any = quantiser.args[0]
    return str(source.target)


class LearntRounding:
    """All quantised weights of a unit while their codes are learnt: those of the parts of a split layer too.

    program: with the scales. rate: of Adam. penalty: λ of the sum that drives every h to 0 or 1. begun: what an earlier
    round has learnt.
    """

    def __init__(
        self,
        program: Program,
        sites: Sequence[str],
        rate: float,
        penalty: float,
        warm_up: float,
        begun: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._begun = begun or {}
        self._program, self._penalty, self._warm_up = program, penalty, warm_up
        layers = dict(program.sites())
        self._nodes: dict[str, fx.Node] = {site: layers[site].args[1] for site in sites}  # type: ignore[misc]
        self._soft = {site: self._rounding(site) for site in sites}
        self.groups = [{"params": [one.alpha], "lr": rate, "base_lr": rate} for one in self._soft.values()]

    def _rounding(self, site: str) -> SoftRounding:
        node, state = self._nodes[site], self._program.state
        bounds = bounds_of(node, self._program)
        found = bounds.lookups
        low, high = (bounds.low, bounds.high) if found is None else (found.lows, found.highs)
        weight, scale = state[weight_name(node)], state[f"{site}.weight_scale"]
        return SoftRounding(weight, scale, low, high, self._begun.get(_kept(site)))

    @property
    def given(self) -> tuple[str, ...]:
        """The nodes whose values it gives."""
        return tuple(node.name for node in self._nodes.values())

    def values(self, done: float) -> tuple[dict[str, Tensor], Tensor | None]:
        """Their values after a share of the steps, and what is added to the loss."""
        shares = {site: one.share() for site, one in self._soft.items()}
        values = {self._nodes[site].name: self._soft[site].weight(share) for site, share in shares.items()}
        beta = annealed(done, self._warm_up, *_BETA)
        if beta is None or not self._penalty:
            return values, None
        return values, self._penalty * torch.stack([undecided(share, beta) for share in shares.values()]).sum()

    def factor(self, done: float) -> float:
        """Of the rate: it stays."""
        return 1.0

    def clip(self) -> None:
        """Any α will do."""

    def first(self) -> dict[str, Tensor]:
        """The values that the program has: rounded to nearest, or by an earlier round."""
        return self._of({site: one.first() for site, one in self._soft.items()})

    def last(self) -> dict[str, Tensor]:
        """The values that were learnt, on their codes."""
        return self._of({site: one.codes() for site, one in self._soft.items()})

    def _of(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        scales = {site: self._program.state[f"{site}.weight_scale"] for site in codes}
        return {self._nodes[site].name: coded(codes[site], scales[site]) for site in codes}

    def learnt(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; `restored_weights` makes tensors of it."""
        return {_kept(site): one.codes() for site, one in self._soft.items()}


def _kept(site: str) -> str:
    """What a checkpoint calls the codes of a site."""
    return f"codes/{site}"


def restored_weights(program: Program, kept: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of codes that were kept, by the names of the program's tensors."""
    layers, found = dict(program.sites()), {}
    for name, codes in kept.items():
        site = name.partition("/")[2]
        quantiser: Any = layers[site].args[1]
        found[weight_name(quantiser)] = coded(codes, program.state[f"{site}.weight_scale"])
    return found
