"""What a loss sees of one graph in one step."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["Seen", "Values"]

Values = Mapping[str, Tensor]
"""Of the nodes that losses asked for, by the losses' own names of them."""


@dataclass(frozen=True)
class Seen:
    """noise: the guided ε [N, …]. weight: of the samples, a number or [N]; None is 1.

    taps: what the losses asked for, of every sample that the denoiser was run on ([2·N, …] with guidance). before: the
    same of the steps before in this trajectory, the latest last, without gradients. queue: pixels that losses queued.
    image_gain: how far an error of the noise moves the image, a number or [N], for losses that ask; None is 1.
    """

    noise: Tensor
    weight: Tensor | float | None = None
    taps: Values = field(default_factory=dict)
    before: tuple[Values, ...] = ()
    queue: Values = field(default_factory=dict)
    image_gain: Tensor | float | None = None
