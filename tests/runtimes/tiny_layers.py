"""What the tiny models of the fusions are made of."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

__all__ = ["CHANNELS", "Tiny", "conv", "layer_norm", "norm", "rows_of", "vector_of"]

CHANNELS = 32


class Tiny(nn.Module):
    """Layers by name, and what is computed with them from an image that depends on the timestep."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self._run = run

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self._run(self, sample + (timestep / 1000).view(-1, 1, 1, 1))


def conv(channels: int = CHANNELS, outputs: int = CHANNELS, kernel: int = 3) -> nn.Conv2d:
    return nn.Conv2d(channels, outputs, kernel, padding=kernel // 2)


def norm(channels: int = CHANNELS) -> nn.GroupNorm:
    """With a weight and a bias that matter."""
    return _random(nn.GroupNorm(8, channels))


def _random(norm: Any) -> Any:
    nn.init.normal_(norm.weight, 1.0, 0.3)
    nn.init.normal_(norm.bias, 0.0, 0.3)
    return norm


def layer_norm(*shape: int) -> nn.LayerNorm:
    return _random(nn.LayerNorm(shape))


def rows_of(x: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, H·W, C]."""
    return x.flatten(2).transpose(1, 2)


def vector_of(x: Tensor) -> Tensor:
    """[N, C] of an image."""
    return x.mean((2, 3))
