"""Small denoisers of attention: several heads, a mask that is added, a scale of their own, and none at all."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import trace
from hqc.capture.source import Source
from hqc.program import InputSpec, Origin, Program

__all__ = ["TOKENS", "WIDTH", "Attending", "attending"]

TOKENS, WIDTH = 6, 32


class Attending(nn.Module):
    """Self-attention over tokens [N, 6, 32] in two heads; with a mask [N, 1, 1, 6] of numbers where asked."""

    def __init__(self, scale: float | None = None, *, masked: bool = False, spread: float = 1.0) -> None:
        super().__init__()
        self.scale, self.masked, self.spread = scale, masked, spread
        self.to_q, self.to_k, self.to_v = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, sample: Tensor, timestep: Tensor, mask: Tensor | None = None) -> Tensor:
        x = sample + (timestep / 1000).view(-1, 1, 1)
        q, k, v = (layer(x).unflatten(-1, (2, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v))
        y = functional.scaled_dot_product_attention(q * self.spread, k, v, mask, scale=self.scale)
        return self.to_out(y.transpose(1, 2).flatten(2))


def attending(model: Callable[[], nn.Module] = Attending, tokens: int = TOKENS) -> Program:
    """Its program, seeded."""
    torch.manual_seed(12)
    module = model()
    inputs = [InputSpec("sample", ("N", tokens, WIDTH)), InputSpec("timestep", ("N",))]
    if getattr(module, "masked", False):
        inputs.append(InputSpec("mask", ("N", 1, 1, tokens)))
    return trace(Source(module, tuple(inputs), Origin(source="attending")))
