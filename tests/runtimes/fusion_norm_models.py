"""Tiny models with norms and concatenations: patterns of fusions, and what keeps them from being one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tiny_layers import Tiny, conv, layer_norm, norm, rows_of, vector_of
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["NORM_MODELS"]


# ---- group norms ---------------------------------------------------------------------------------------------------


def norm_alone() -> nn.Module:
    """Group norm and SiLU between two convolutions."""
    return Tiny(lambda m, x: m.last(functional.silu(m.norm(m.conv(x)))), conv=conv(), norm=norm(), last=conv())


def norm_read_by_two() -> nn.Module:
    """Two convolutions read one norm, without SiLU."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.norm(m.conv(x))
        return m.left(y) * torch.tanh(m.right(y))

    return Tiny(run, conv=conv(), norm=norm(), left=conv(), right=conv(kernel=1))


def norm_kept() -> nn.Module:
    """The floats of a norm are added to what a convolution makes of it."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = functional.silu(m.norm(m.conv(x)))
        return m.last(y) + torch.tanh(y)

    return Tiny(run, conv=conv(), norm=norm(), last=conv())


def norm_of_tokens() -> nn.Module:
    """[N, C, T]: diffusers' older attention."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.norm(m.conv(x).flatten(2)).unflatten(2, (4, 4)))

    return Tiny(run, conv=conv(), norm=norm(), last=conv())


def norm_with_computed_weight() -> nn.Module:
    """Half its weight."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.group_norm(m.conv(x), 8, m.norm.weight * 0.5, m.norm.bias))

    return Tiny(run, conv=conv(), norm=norm(), last=conv())


def norm_with_weight_alone() -> nn.Module:
    """No bias."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.group_norm(m.conv(x), 8, m.norm.weight))

    return Tiny(run, conv=conv(), norm=norm(), last=conv())


def norm_before_float() -> nn.Module:
    """A grouped convolution reads it, which nothing quantises."""
    grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
    return Tiny(lambda m, x: m.grouped(functional.silu(m.norm(m.conv(x)))), conv=conv(), norm=norm(), grouped=grouped)


def norm_of_float() -> nn.Module:
    """No convolution writes what it reads."""
    return Tiny(lambda m, x: m.last(m.norm(torch.tanh(x))), norm=norm(), last=conv())


# ---- two images side by side ---------------------------------------------------------------------------------------


def skip() -> nn.Module:
    """The first half of a ResNet block that reads a skip connection, and its shortcut."""

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.left(x), m.right(x)], 1)
        return m.last(functional.silu(m.norm(both))) + torch.tanh(m.shortcut(both))

    layers = {"left": conv(), "right": conv(outputs=16, kernel=1), "norm": norm(48)}
    return Tiny(run, **layers, last=conv(48), shortcut=conv(48, kernel=1))


def three_parts() -> nn.Module:
    """A concatenation of three."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return m.last(torch.cat([y, torch.tanh(y), torch.sin(y)], 1))

    return Tiny(run, conv=conv(), last=conv(96))


def parts_read_elsewhere() -> nn.Module:
    """The concatenation is read by something else than quantisers too."""

    def run(m: Any, x: Tensor) -> Tensor:
        both = torch.cat([m.conv(x), torch.tanh(x)], 1)
        return m.last(both) * both.mean(1, keepdim=True)

    return Tiny(run, conv=conv(), last=conv(64))


def beside_before() -> nn.Module:
    """The shortcut's convolution stands before the norm."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.tanh(m.shortcut(y)) + m.last(functional.silu(m.norm(y)))

    return Tiny(run, conv=conv(), shortcut=conv(kernel=1), norm=norm(), last=conv())


# ---- layer norms ---------------------------------------------------------------------------------------------------


def rows_normed() -> nn.Module:
    """Layer norm before a linear."""
    return Tiny(lambda m, x: m.last(m.norm(rows_of(x))), norm=layer_norm(32), last=nn.Linear(32, 16))


def rows_normed_and_kept() -> nn.Module:
    """The floats are read too."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.norm(rows_of(x))
        return m.last(y) + torch.tanh(y)

    return Tiny(run, norm=layer_norm(32), last=nn.Linear(32, 32))


def rows_modulated() -> nn.Module:
    """A transformer's norm, which its modulation reads."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(m.norm(rows_of(x)) * (1 + m.vector(vector_of(x)).unsqueeze(1)))

    return Tiny(run, norm=layer_norm(32), vector=nn.Linear(32, 32), last=nn.Linear(32, 16))


def rows_normed_over_two_axes() -> nn.Module:
    """Over tokens and channels."""
    return Tiny(lambda m, x: m.last(m.norm(rows_of(x))), norm=layer_norm(16, 32), last=nn.Linear(32, 16))


def rows_normed_with_computed_weight() -> nn.Module:
    """Half its weight."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.layer_norm(rows_of(x), (32,), m.norm.weight * 0.5, m.norm.bias))

    return Tiny(run, norm=layer_norm(32), last=nn.Linear(32, 16))


def rows_normed_with_weight_alone() -> nn.Module:
    """No bias."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.layer_norm(rows_of(x), (32,), m.norm.weight))

    return Tiny(run, norm=layer_norm(32), last=nn.Linear(32, 16))


NORM_MODELS: Mapping[str, Callable[[], nn.Module]] = {
    f.__name__: f
    for f in (
        norm_alone,
        norm_read_by_two,
        norm_kept,
        norm_of_tokens,
        norm_with_computed_weight,
        norm_with_weight_alone,
        norm_before_float,
        norm_of_float,
        skip,
        three_parts,
        parts_read_elsewhere,
        beside_before,
        rows_normed,
        rows_normed_and_kept,
        rows_modulated,
        rows_normed_over_two_axes,
        rows_normed_with_computed_weight,
        rows_normed_with_weight_alone,
    )
}
