"""A pipeline and a classifier that take microseconds and behave like the real ones."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hqc.evaluation.sampling import Samples, SamplingProtocol


class FakeVae:
    """Enlarges four times the mean over latent channels."""

    config = SimpleNamespace(block_out_channels=(8, 8, 8), out_channels=1)

    @staticmethod
    def decode(latents: Tensor) -> Tensor:
        return torch.tanh(2 * latents.mean(1, keepdim=True)).repeat_interleave(4, 2).repeat_interleave(4, 3)


class FakePipeline:
    """Called as `ClassConditionalLDMPipeline` is; latents are noise plus the label, per generator."""

    def __init__(self) -> None:
        self.vae, self.scheduler = FakeVae(), SimpleNamespace()
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=8))
        self.class_embedder = SimpleNamespace(config=SimpleNamespace(num_classes=10))
        self.calls: list[dict[str, Any]] = []
        self.gain = 1.0

    def __call__(
        self,
        class_labels: list[int],
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        eta: float = 0.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Any = None,
    ) -> tuple[Any]:
        assert generator is not None
        assert output_type == "np"
        assert not return_dict
        self.calls.append({"labels": class_labels, "steps": num_inference_steps, "eta": eta, "g": guidance_scale})
        noise = [torch.randn(3, 8, 8, generator=g) + eta * torch.randn(3, 8, 8, generator=g) for g in generator]
        latents = self.gain * (torch.stack(noise) + torch.tensor(class_labels)[:, None, None, None] / 10)
        callback_on_step_end(self, 0, 1, {"latents": torch.zeros_like(latents)})  # only the last step's are kept
        callback_on_step_end(self, 1, 0, {"latents": latents})
        return ((self.vae.decode(latents) / 2 + 0.5).permute(0, 2, 3, 1).numpy(),)


class FakeClassifier(torch.nn.Module):
    """Four pooled values as features, a fixed linear layer for logits; records the images it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.head = torch.nn.Linear(4, 10)
        with torch.no_grad():
            generator = torch.Generator().manual_seed(7)
            self.head.weight.copy_(3 * torch.randn(10, 4, generator=generator))
        self.seen: list[Tensor] = []

    def features(self, images: Tensor) -> Tensor:
        assert not self.training
        self.seen.append(images)
        return torch.nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits


def make_samples(
    count: int = 40, *, noise: float = 0.0, seed: int = 0, size: int = 16, channels: int = 1, steps: int = 20
) -> Samples:
    """Random images with labels 0…9 in turn; `noise` perturbs images and latents of the same base."""
    base, extra = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    images = torch.rand(count, channels, size, size, generator=base)
    latents = torch.randn(count, 3, 4, 4, generator=base)
    images = (images + noise * torch.randn(images.shape, generator=extra)).clamp(0, 1)
    latents = latents + noise * torch.randn(latents.shape, generator=extra)
    labels = tuple(i % 10 for i in range(count))
    return Samples(images, latents, labels, tuple(range(count)), SamplingProtocol("DDIMScheduler", steps, 1.5, 0.0))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pipe() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def classifier() -> FakeClassifier:
    return FakeClassifier()


@pytest.fixture
def samples_factory() -> Any:
    return make_samples
