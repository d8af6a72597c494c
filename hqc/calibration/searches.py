"""Scales of a tensor by search: the candidate range whose codes are nearest to the values, summed over calls.

    symmetric     x̂ = s·clip(round(x/s), -q, q)          ranges 1/n … 1.05 of the largest |value|
    asymmetric    x̂ = s·clip(round(x/s), -z, 2ⁿ-1-z)     the span of the values and 0, shrunk to 1/n … 1 of itself

The error is Σ |x̂ - x|^p. Source: p = 2.4 and the two-sided shrinking are EfficientDM's and Q-Diffusion's.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hqc.bits import activation_range, asymmetric_top

__all__ = ["AsymmetricSearch", "Search", "SymmetricSearch", "activation_search", "some_values"]

_VALUES_A_CALL = 16_384
_CACHED_VALUES = 2_048
"""Values that are tried with all candidates at once: the table of both stays in the cache."""


class _Candidates(NamedTuple):
    """Scales [K] ascending and, where they differ, zero points [K]."""

    scales: Tensor
    zeros: Tensor | None


def some_values(x: Tensor) -> Tensor:
    """At most about 16 384 of the values: an odd stride visits every channel of a contiguous tensor in turn."""
    flat = x.reshape(-1)
    return flat[:: max(1, flat.numel() // _VALUES_A_CALL) | 1]


class Search:
    """Running error of every candidate for the values of one site and timestep."""

    def __init__(self, count: int, power: float = 2.0) -> None:
        self._count, self._power = count, power
        self._seen, self._energy = 0, 0.0
        self._found = _Candidates(torch.ones(0), None)
        self._errors = torch.zeros(0)

    def _candidates(self, least: float, largest: float) -> _Candidates:
        raise NotImplementedError

    def _clip(self, levels: Tensor) -> Tensor:
        raise NotImplementedError

    def add(self, x: Tensor, least: float, largest: float) -> None:
        """Takes values of a call whose range is least … largest."""
        new = self._candidates(least, largest)
        if self._energy == 0:  # zeros cost nothing at any scale
            self._found, self._errors = new, torch.zeros(len(new.scales))
        elif max(-least, largest) > 0:
            self._widen(new)
        self._seen += x.numel()
        self._energy += float(self._sum(x.unsqueeze(0).clone()))
        scale = self._found.scales.unsqueeze(1)
        for part in torch.split(x, _CACHED_VALUES):
            self._errors += self._sum(self._clip((part / scale).round_()).mul_(scale).sub_(part))

    def _sum(self, errors: Tensor) -> Tensor:
        """Σ|e|^p of each row; the tensor is used up."""
        return (errors.square_() if self._power == 2 else errors.abs_().pow_(self._power)).sum(1)

    def _widen(self, new: _Candidates) -> None:
        """Adds the larger of these candidates, for a call whose values outgrow the earlier ones.

        Earlier values are not clipped there: their error is that of uniform rounding, E|e|^p = (s/2)^p/(p+1) each, at
        most Σ|x|^p.
        """
        larger = new.scales > self._found.scales[-1]
        scales, p = new.scales[larger], self._power
        rounding = scales.square() / 12 if p == 2 else (scales / 2).pow(p) / (p + 1)
        self._errors = torch.cat([self._errors, (rounding * self._seen).clamp_max(self._energy)])
        zeros = None
        if self._found.zeros is not None and new.zeros is not None:
            zeros = torch.cat([self._found.zeros, new.zeros[larger]])
        self._found = _Candidates(torch.cat([self._found.scales, scales]), zeros)

    @property
    def scale(self) -> float:
        """Of the best candidate."""
        return float(self._found.scales[self._errors.argmin()])

    @property
    def zero(self) -> float:
        """Of the best candidate; 0 where codes are symmetric."""
        return 0.0 if self._found.zeros is None else float(self._found.zeros[self._errors.argmin()])


class SymmetricSearch(Search):
    """Codes low … high for both signs alike."""

    def __init__(self, low: int, high: int, count: int, power: float = 2.0) -> None:
        super().__init__(count, power)
        self._low, self._high = low, high

    def _candidates(self, least: float, largest: float) -> _Candidates:
        top, code = max(-least, largest), max(-self._low, self._high)
        ratios = torch.linspace(1.0 / self._count, 1.05, self._count)
        return _Candidates((top / code if top > 0 else 1.0) * ratios, None)

    def _clip(self, levels: Tensor) -> Tensor:
        return levels.clamp_(self._low, self._high)


class AsymmetricSearch(Search):
    """Codes -z … top - z, real 0 being code 0."""

    def __init__(self, top: int, count: int, power: float = 2.0) -> None:
        super().__init__(count, power)
        self._top = top

    def _candidates(self, least: float, largest: float) -> _Candidates:
        least, largest = min(least, 0.0), max(largest, 0.0)
        span = largest - least
        ratios = torch.linspace(1.0 / self._count, 1.0, self._count)
        zero = round(-least / span * self._top) if span > 0 else 0
        return _Candidates((span / self._top if span > 0 else 1.0) * ratios, torch.full((self._count,), float(zero)))

    def _clip(self, levels: Tensor) -> Tensor:
        assert self._found.zeros is not None
        zero = self._found.zeros.unsqueeze(1)
        return levels.clamp_(-zero, self._top - zero)


def activation_search(bits: int, symmetric: bool, count: int, power: float = 2.0) -> Search:
    """A search for the range of a site's activations."""
    if symmetric:
        return SymmetricSearch(*activation_range(bits), count, power)
    return AsymmetricSearch(asymmetric_top(bits), count, power)
