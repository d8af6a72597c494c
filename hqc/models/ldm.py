"""Latent diffusion pipelines in diffusers conventions: class-conditional with guidance, and unconditional."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DiffusionPipeline, ImagePipelineOutput, UNet2DConditionModel, UNet2DModel, VQModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.image_processor import VaeImageProcessor
from diffusers.models.modeling_utils import ModelMixin
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Generator, Tensor, nn

from hqc.errors import EvaluationError
from hqc.sizes import sides

__all__ = ["ClassConditionalLDMPipeline", "ClassEmbedder", "OutputType", "UnconditionalLDMPipeline"]

OutputType = Literal["pil", "np", "pt", "latent"]
StepCallback = Callable[[Any, int, Tensor, dict[str, Any]], dict[str, Any]]


class ClassEmbedder(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """One learnt token per class; the last row, `num_classes`, stands for "no class" (unconditional)."""

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(self, num_classes: int = 10, dim: int = 64) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, dim)

    @property
    def unconditional_label(self) -> int:
        """The label of the unconditional class."""
        return int(self.config.num_classes)

    def forward(self, labels: Tensor) -> Tensor:
        """Labels `[N]` in 0…num_classes → tokens `[N, 1, D]`, the UNet's cross-attention context."""
        tokens: Tensor = self.embedding(labels)[:, None, :]
        return tokens


class _LatentPipeline(DiffusionPipeline):  # type: ignore[misc]
    """What both pipelines share: noise at the start, the decoder at the end.

    Of `unet` it uses only the call, `config.in_channels`, `config.sample_size` and `dtype`, so that any
    object with these can replace it. A `VQModel` snaps the latents to its codebook before it decodes them.
    """

    def _initial_latents(
        self,
        count: int,
        generator: Generator | list[Generator] | None,
        latents: Tensor | None,
        device: torch.device,
    ) -> Tensor:
        shape = (count, self.unet.config.in_channels, *sides(self.unet.config.sample_size))
        if isinstance(generator, list) and len(generator) != count:
            raise EvaluationError(
                "generator",
                f"found {len(generator)} for {count} images",
                "Pass one generator per image, or one.",
            )
        if latents is None:
            return torch.as_tensor(randn_tensor(shape, generator=generator, device=device, dtype=self.unet.dtype))
        if tuple(latents.shape) != shape:
            raise EvaluationError(
                "latents",
                f"found shape {tuple(latents.shape)}, expected {shape}",
                "Pass noise of that shape.",
            )
        return latents.to(device=device, dtype=self.unet.dtype)

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        latents = (latents / self.vae.config.scaling_factor).to(self.vae.dtype)
        decoded = self.vae.decode(latents, return_dict=False)[0]  # [N, 1, 32, 32] in [-1, 1]
        return self.image_processor.postprocess(decoded, output_type=output_type)

    def _step_options(self, generator: Generator | list[Generator] | None, eta: float) -> dict[str, Any]:
        accepted = inspect.signature(self.scheduler.step).parameters
        options = {"eta": eta, "generator": generator}
        return {name: value for name, value in options.items() if name in accepted}


class ClassConditionalLDMPipeline(_LatentPipeline):
    """Samples images of given classes: class token → UNet in latent space → decoder."""

    model_cpu_offload_seq = "class_embedder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL | VQModel,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        class_embedder: ClassEmbedder,
    ) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler, class_embedder=class_embedder)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | Sequence[int] | Tensor,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample one image per label.

        With guidance scale g > 1, one UNet call on the batch [unconditional; conditional] gives
        ε = ε_u + g·(ε_c - ε_u); with g ≤ 1 the unconditional half is left out, as in diffusers' pipelines.

        Args:
            class_labels: N labels in 0…num_classes (the last is unconditional), or one.
            num_inference_steps: steps of the scheduler.
            guidance_scale: g.
            eta: η of DDIM, for schedulers that take it.
            generator: one for the batch, or one per image: an image then does not depend on its batch.
            latents: initial noise `[N, C, H, W]` of unit variance; drawn from `generator` where it is None.
            output_type: "pil", "np" `[N, H, W, C]` or "pt" `[N, C, H, W]` in [0, 1], or "latent"
                (scaled latents, not decoded).
            return_dict: a tuple is returned where it is False.
            callback_on_step_end: (pipeline, step, timestep, {"latents": …}) -> what to go on with, after each step.

        Raises:
            EvaluationError: labels outside the classes, a list of generators of another length, or latents of
                another shape.
        """
        device = self._execution_device
        labels = self._checked_labels(class_labels, device)
        latents = self._initial_latents(len(labels), generator, latents, device)
        guided = guidance_scale > 1
        tokens = self._tokens(labels, guided)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        step_options = self._step_options(generator, eta)
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            noise = self._predicted_noise(latents, t, tokens, guidance_scale if guided else None)
            latents = self.scheduler.step(noise, t, latents, **step_options, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, t, {"latents": latents})["latents"]
        images = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _checked_labels(self, class_labels: int | Sequence[int] | Tensor, device: torch.device) -> Tensor:
        labels = torch.as_tensor(class_labels, dtype=torch.int64).reshape(-1).to(device)
        last = self.class_embedder.config.num_classes
        if labels.numel() == 0 or labels.min() < 0 or labels.max() > last:
            raise EvaluationError(
                "class_labels", f"found {labels.tolist()}, expected labels in 0…{last}", "Correct the labels."
            )
        return labels

    def _tokens(self, labels: Tensor, guided: bool) -> Tensor:
        if guided:
            unconditional = torch.full_like(labels, self.class_embedder.unconditional_label)
            labels = torch.cat([unconditional, labels])  # [2N]
        return torch.as_tensor(self.class_embedder(labels)).to(self.unet.dtype)

    def _predicted_noise(self, latents: Tensor, t: Tensor, tokens: Tensor, guidance_scale: float | None) -> Tensor:
        model_input = latents if guidance_scale is None else torch.cat([latents, latents])
        model_input = self.scheduler.scale_model_input(model_input, t)
        t_batch = t.expand(len(model_input))  # [N], or [2N] with guidance
        output = self.unet(model_input, t_batch, encoder_hidden_states=tokens, return_dict=False)
        noise: Tensor = output[0]
        if guidance_scale is None:
            return noise
        unconditional, conditional = noise.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)


class UnconditionalLDMPipeline(_LatentPipeline):
    """Samples images without a condition: UNet in latent space → decoder.

    diffusers' LDMPipeline does the same for a VQModel alone, and cannot return latents.
    """

    model_cpu_offload_seq = "unet->vae"

    def __init__(self, vae: AutoencoderKL | VQModel, unet: UNet2DModel, scheduler: KarrasDiffusionSchedulers) -> None:
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)
        self.image_processor = VaeImageProcessor(vae_scale_factor=2 ** (len(vae.config.block_out_channels) - 1))

    @torch.no_grad()
    def __call__(
        self,
        batch_size: int = 1,
        num_inference_steps: int = 20,
        eta: float = 0.0,
        generator: Generator | list[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepCallback | None = None,
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample `batch_size` images; the other arguments as for `ClassConditionalLDMPipeline`.

        Raises:
            EvaluationError: a list of generators of another length, or latents of another shape.
        """
        device = self._execution_device
        latents = self._initial_latents(batch_size, generator, latents, device)
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        latents = latents * self.scheduler.init_noise_sigma
        step_options = self._step_options(generator, eta)
        for step, t in enumerate(self.progress_bar(self.scheduler.timesteps)):
            model_input = self.scheduler.scale_model_input(latents, t)
            noise = self.unet(model_input, t.expand(len(model_input)), return_dict=False)[0]
            latents = self.scheduler.step(noise, t, latents, **step_options, return_dict=False)[0]
            if callback_on_step_end is not None:
                latents = callback_on_step_end(self, step, t, {"latents": latents})["latents"]
        images = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)
