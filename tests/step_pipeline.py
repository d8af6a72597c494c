"""A pipeline whose denoiser is one line, with a scheduler of diffusers: what it does can be written down in numpy."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = ["SHAPE", "StepPipeline", "first_latents"]

SHAPE = (3, 4, 4)

Noise = Callable[[Tensor, float, Tensor], Tensor]
"""(x [N, 3, 4, 4], timestep, labels [N], 0 for none) -> ε."""


def first_latents(seeds: Sequence[int]) -> Tensor:
    """Where the pipeline starts for these seeds."""
    return torch.stack([torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


class StepPipeline:
    """Class-conditional with guidance; images are the latents themselves, squashed to [0, 1]."""

    def __init__(self, noise: Noise, scheduler: Any, *, return_dict: bool = False) -> None:
        self.noise, self.scheduler, self.return_dict = noise, scheduler, return_dict
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=SHAPE[1]))
        self.class_embedder = SimpleNamespace(config=SimpleNamespace(num_classes=3))

    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        eta: float = 0.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> tuple[Any]:
        assert generator is not None
        x = torch.stack([torch.randn(SHAPE, generator=g) for g in generator])
        labels = torch.tensor(class_labels)
        self.scheduler.set_timesteps(num_inference_steps)
        x = x * self.scheduler.init_noise_sigma
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(x, t)
            null, wanted = (self.noise(given, float(t), told) for told in (torch.zeros_like(labels), labels))
            noise = null + guidance_scale * (wanted - null)
            x = self._step(noise, t, x, eta, generator)
        return (torch.sigmoid(x).permute(0, 2, 3, 1).numpy(),)

    def _step(self, noise: Tensor, t: Tensor, x: Tensor, eta: float, generator: list[torch.Generator]) -> Tensor:
        options = {"eta": eta, "generator": generator} if type(self.scheduler).__name__ == "DDIMScheduler" else {}
        result = self.scheduler.step(noise, t, x, **options, return_dict=self.return_dict)
        found: Tensor = result.prev_sample if self.return_dict else result[0]
        return found
