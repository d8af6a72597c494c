"""Tiny models that each hold one pattern of a fusion, or what keeps it from being one; captured once a session."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from fusion_norm_models import NORM_MODELS
from tiny_layers import CHANNELS, Tiny, conv, rows_of, vector_of
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import trace
from hqc.capture.source import Source
from hqc.program import InputSpec, Origin, Program

__all__ = ["MODELS", "model"]


# ---- products that read the same codes -----------------------------------------------------------------------------


def _attend(m: Any, x: Tensor) -> Tensor:
    tokens = rows_of(x)
    return functional.scaled_dot_product_attention(m.to_q(tokens), m.to_k(tokens), m.to_v(tokens))


def three_products() -> nn.Module:
    """One of them without a bias."""
    layers = {name: nn.Linear(32, 32, bias=name != "to_q") for name in ("to_q", "to_k", "to_v")}
    return Tiny(_attend, **layers)


def another_form() -> nn.Module:
    """The last one's weight is a constant: its rotated codes need two digits."""
    layers = {name: nn.Linear(32, 32) for name in ("to_q", "to_k", "to_v")}
    nn.init.constant_(layers["to_v"].weight, 0.1)
    return Tiny(_attend, **layers)


# ---- upsampling ----------------------------------------------------------------------------------------------------


def upsampled() -> nn.Module:
    """Twice as large, between two convolutions."""
    return Tiny(lambda m, x: m.up(functional.interpolate(m.before(x), scale_factor=2.0)), before=conv(), up=conv())


def upsampled_unevenly() -> nn.Module:
    """From 4×4 to 6×6."""
    return Tiny(lambda m, x: m.up(functional.interpolate(m.before(x), size=(6, 6))), before=conv(), up=conv())


# ---- vectors that are added ----------------------------------------------------------------------------------------


def shift_of_image() -> nn.Module:
    """The time embedding of a ResNet block, here of the image's mean; then SiLU."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.silu(m.conv(x) + m.vector(vector_of(x))[:, :, None, None]))

    return Tiny(run, conv=conv(), vector=nn.Linear(32, 32), last=conv())


def shift_of_tokens() -> nn.Module:
    """A token that is added to all, with a residual before it."""

    def run(m: Any, x: Tensor) -> Tensor:
        tokens = rows_of(x)
        return m.last(torch.tanh(tokens + m.linear(torch.tanh(tokens)) + m.vector(vector_of(x)).unsqueeze(1)))

    return Tiny(run, linear=nn.Linear(32, 32), vector=nn.Linear(32, 32), last=nn.Linear(32, 8))


def shift_read_before() -> nn.Module:
    """Somebody reads the product without the vector."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.conv(x)
        return torch.tanh(y) * (y + m.vector(vector_of(x))[:, :, None, None])

    return Tiny(run, conv=conv(), vector=nn.Linear(32, 32))


def shift_after_silu() -> nn.Module:
    """SiLU comes first."""

    def run(m: Any, x: Tensor) -> Tensor:
        return torch.tanh(functional.silu(m.conv(x)) + m.vector(vector_of(x))[:, :, None, None])

    return Tiny(run, conv=conv(), vector=nn.Linear(32, 32))


def shift_of_rows() -> nn.Module:
    """A linear of [N, H, W, C], to which a number for each row H is added."""

    def run(m: Any, x: Tensor) -> Tensor:
        rows = m.vector(vector_of(x))[:, :, None, None]  # [N, 4, 1, 1]
        return torch.tanh(m.linear(torch.tanh(x.permute(0, 2, 3, 1))) + rows)

    return Tiny(run, linear=nn.Linear(32, 32), vector=nn.Linear(32, 4))


# ---- gates ---------------------------------------------------------------------------------------------------------


def gated() -> nn.Module:
    """GEGLU."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, g = m.wide(rows_of(x)).chunk(2, -1)
        return m.last(a * functional.gelu(g))

    return Tiny(run, wide=nn.Linear(32, 128), last=nn.Linear(64, 16))


def gated_first_half() -> nn.Module:
    """SwiGLU as LLaMA has it: SiLU of the first half."""

    def run(m: Any, x: Tensor) -> Tensor:
        g, a = m.wide(rows_of(x)).chunk(2, -1)
        return m.last(functional.silu(g) * a)

    return Tiny(run, wide=nn.Linear(32, 128), last=nn.Linear(64, 16))


def activated() -> nn.Module:
    """An MLP with the approximate GELU."""

    def run(m: Any, x: Tensor) -> Tensor:
        return m.last(functional.gelu(m.wide(rows_of(x)), approximate="tanh"))

    return Tiny(run, wide=nn.Linear(32, 64), last=nn.Linear(64, 16))


def activation_read_twice() -> nn.Module:
    """Its floats are read too."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = functional.gelu(m.wide(rows_of(x)))
        return m.last(y) + torch.tanh(y)

    return Tiny(run, wide=nn.Linear(32, 32), last=nn.Linear(32, 32))


def gate_with_halves_read_elsewhere() -> nn.Module:
    """One half is read again."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, g = m.wide(rows_of(x)).chunk(2, -1)
        return m.last(a * functional.gelu(g)) + torch.tanh(a)

    return Tiny(run, wide=nn.Linear(32, 64), last=nn.Linear(32, 32))


def gate_of_floats() -> nn.Module:
    """No product writes the halves."""

    def run(m: Any, x: Tensor) -> Tensor:
        a, g = torch.tanh(m.wide(rows_of(x))).chunk(2, -1)
        return m.last(a * functional.gelu(g))

    return Tiny(run, wide=nn.Linear(32, 64), last=nn.Linear(32, 16))


def gate_behind_residual() -> nn.Module:
    """The product of the halves adds a residual."""

    def run(m: Any, x: Tensor) -> Tensor:
        tokens = rows_of(x)
        a, g = (m.wide(tokens) + torch.cat([tokens, tokens], -1)).chunk(2, -1)
        return m.last(a * functional.gelu(g))

    return Tiny(run, wide=nn.Linear(32, 64), last=nn.Linear(32, 16))


# ---- products that write codes -------------------------------------------------------------------------------------


def chain() -> nn.Module:
    """Two convolutions with a SiLU between them, then tokens into an image before a 1×1 convolution."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = rows_of(torch.tanh(m.second(functional.silu(m.first(x)))))
        image = m.linear(y).reshape(x.shape[0], 4, 4, 32).permute(0, 3, 1, 2)
        return m.last(image)

    layers = {"first": conv(outputs=64), "second": conv(64), "linear": nn.Linear(32, 32)}
    return Tiny(run, **layers, last=conv(kernel=1))


def product_read_by_two() -> nn.Module:
    """A convolution and something else."""

    def run(m: Any, x: Tensor) -> Tensor:
        y = m.first(x)
        return m.last(y) * torch.tanh(y)

    return Tiny(run, first=conv(), last=conv())


def other_axes() -> nn.Module:
    """A linear over the columns of a convolution's image."""
    return Tiny(lambda m, x: m.last(m.first(x)), first=conv(), last=nn.Linear(4, 8))


# ---- attention -----------------------------------------------------------------------------------------------------


def _wide_attention(heads: int, width: int, attend: Callable[..., Tensor]) -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        tokens = rows_of(x)
        q, k, v = (f(tokens).view(x.shape[0], -1, heads, width).transpose(1, 2) for f in (m.to_q, m.to_k, m.to_v))
        return m.to_out(attend(q, k, v).transpose(1, 2).reshape(x.shape[0], -1, heads * width))

    layers = {name: nn.Linear(32, heads * width, bias=False) for name in ("to_q", "to_k", "to_v")}
    return Tiny(run, **layers, to_out=nn.Linear(heads * width, 32))


def one_wide_head() -> nn.Module:
    """A head of 320 channels."""
    return _wide_attention(1, 320, functional.scaled_dot_product_attention)


def two_wide_heads() -> nn.Module:
    """Heads of 288 channels, and a scale of its own."""
    return _wide_attention(2, 288, lambda q, k, v: functional.scaled_dot_product_attention(q, k, v, scale=0.1))


def narrow_heads() -> nn.Module:
    """Heads that torch's own kernels take."""
    return _wide_attention(2, 256, functional.scaled_dot_product_attention)


def wide_head_with_a_mask() -> nn.Module:
    """A mask of tokens that lie behind."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        places = torch.arange(6)
        mask = places[:, None] >= places[None, :]
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return _wide_attention(1, 320, attend)


def wide_head_read_before_it_is_joined() -> nn.Module:
    """Its result is read with its heads apart."""

    def run(m: Any, x: Tensor) -> Tensor:
        tokens = rows_of(x)
        q, k, v = (f(tokens).view(x.shape[0], -1, 1, 320).transpose(1, 2) for f in (m.to_q, m.to_k, m.to_v))
        return m.to_out(functional.scaled_dot_product_attention(q, k, v).mean(1))

    layers = {name: nn.Linear(32, 320) for name in ("to_q", "to_k", "to_v")}
    return Tiny(run, **layers, to_out=nn.Linear(320, 32))


MODELS: Mapping[str, Callable[[], nn.Module]] = {
    **NORM_MODELS,
    **{
        f.__name__: f
        for f in (
            three_products,
            another_form,
            upsampled,
            upsampled_unevenly,
            shift_of_image,
            shift_of_tokens,
            shift_read_before,
            shift_after_silu,
            shift_of_rows,
            gated,
            gated_first_half,
            activated,
            activation_read_twice,
            gate_with_halves_read_elsewhere,
            gate_of_floats,
            gate_behind_residual,
            chain,
            product_read_by_two,
            other_axes,
            one_wide_head,
            two_wide_heads,
            narrow_heads,
            wide_head_with_a_mask,
            wide_head_read_before_it_is_joined,
        )
    },
}


@cache
def model(name: str) -> Program:
    """A model's program; images are 4×4, those of attention 2×3. Never change it in place."""
    torch.manual_seed(21)
    size = (2, 3) if "head" in name else (4, 4)
    inputs = (InputSpec("sample", ("N", CHANNELS, *size)), InputSpec("timestep", ("N",)))
    return trace(Source(MODELS[name](), inputs, Origin(source=name)))
