"""A pipeline that draws in microseconds or waits at a gate, and a real HTTP server around it."""

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from diffusers import DDIMScheduler
from served_app import served

import hqc
from hqc.program import Program
from hqc.serving.engine import Policy
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits
from hqc.serving.pipelines import PipelineBackend


class FakePipeline:
    """Called as `ClassConditionalLDMPipeline` is. With `gate` set, a call waits until it opens."""

    def __init__(self) -> None:
        self.unet = SimpleNamespace(config=SimpleNamespace(sample_size=8))
        self.scheduler: Any = DDIMScheduler(num_train_timesteps=100)
        self.vae = SimpleNamespace(config=SimpleNamespace(block_out_channels=(8, 8, 8), out_channels=1))
        self.class_embedder = SimpleNamespace(config=SimpleNamespace(num_classes=10))
        self.calls: list[dict[str, Any]] = []
        self.entered = threading.Semaphore(0)
        self.gate: threading.Event | None = None
        self.failure: Exception | None = None

    def __call__(
        self,
        *,
        generator: list[torch.Generator],
        class_labels: list[int],
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        eta: float = 0.0,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> Any:
        options = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale, "eta": eta}
        options |= {"output_type": output_type, "return_dict": return_dict}
        self.calls.append({"class_labels": class_labels, **options})
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(30)
        if self.failure is not None:
            raise self.failure
        noise = torch.stack([torch.randn(3, 8, 8, generator=each) for each in generator])
        latents = noise + torch.tensor(class_labels)[:, None, None, None] / 10
        images = torch.tanh(latents.mean(1, keepdim=True)).repeat_interleave(4, 2).repeat_interleave(4, 3)
        return ((images / 2 + 0.5).permute(0, 2, 3, 1).numpy(),)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def few_digits(captured: Callable[[str], Program]) -> Program:
    """`digits` at w4a4, by scales of two timesteps."""
    few = {"calibrate_activations.samples": 2, "sampler.num_inference_steps": 2}
    return hqc.ptq(captured("digits"), "rtn", "w4a4", hadamard=True, settings=few)


@pytest.fixture
def pipe() -> FakePipeline:
    return FakePipeline()


@pytest.fixture
def start(pipe: FakePipeline) -> Iterator[Callable[..., httpx.Client]]:
    """Starts a server of a pipeline, `pipe` without one, with the given limits; the gate is opened at the end."""
    with ExitStack() as stack:

        def begin(
            other: Any = None,
            *,
            backend: Any = None,
            beside: Any = None,
            rules: Rules | None = None,
            cors_origins: tuple[str, ...] = (),
            policy: Policy = "continuous",  # what shares a call does not depend on what it costs here
            **limits: Any,
        ) -> httpx.Client:
            shown = backend or PipelineBackend(other or pipe)
            return stack.enter_context(
                served(shown, Limits(**limits), rules, beside, cors_origins=cors_origins, policy=policy)
            )

        yield begin
        if pipe.gate is not None:
            pipe.gate.set()


@pytest.fixture
def client(start: Callable[..., httpx.Client]) -> httpx.Client:
    return start(max_images=4, max_steps=50, max_batch=1, max_queue=2)
