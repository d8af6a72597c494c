"""Small denoisers of attention: several heads, a mask that is added, a scale of their own, and none at all."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import trace
from hqc.capture.source import Source
from hqc.passes import InsertAttentionQdq, InsertQdq, OpenAttention, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Origin, Program

__all__ = ["TOKENS", "WIDTH", "Attending", "attending", "attention_quantised"]

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


@cache
def _captured(**model: Any) -> Program:
    """Captured once a process."""
    return attending(partial(Attending, 0.3, spread=4.0, **model), tokens=12)


def attention_quantised(
    softmax_bits: int,
    operands: str,
    kinds: tuple[float, ...] = (0.0, 1.0, 0.0),
    *,
    bits: str = "w4a4",
    static: bool = False,
    **model: Any,
) -> Program:
    """Attention over 12 tokens with random scales and zero points, and a kind of steps for each of three timesteps."""
    insert = InsertAttentionQdq(softmax_bits, operands, static)  # type: ignore[arg-type]
    steps = [OpenAttention(), SelectLayers(bits=bits), InsertQdq((0.0, 500.0, 999.0)), insert]
    result = run_pipeline(_captured(**model), steps)
    generator, state = torch.Generator().manual_seed(2), dict(result.state)
    for name, tensor in state.items():
        if name.endswith("softmax.activation_scale_table"):
            state[name] = tensor * (0.7 + 0.3 * torch.rand(tensor.shape, generator=generator))
        elif name.endswith("scale_table"):
            state[name] = 0.2 + 0.3 * torch.rand(tensor.shape, generator=generator)
        elif name.endswith("zero_table"):  # from the middle, which is half of all codes
            state[name] = (tensor * 2 * torch.rand(tensor.shape, generator=generator)).floor()
        elif name.endswith("log2_table"):
            state[name] = torch.tensor(kinds)[: len(tensor)]
    return result.evolve(state=state)
