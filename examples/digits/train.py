"""Train the bundled model `digits` from nothing: classifier, KL autoencoder, latents, UNet, diffusers folder.

Every random draw depends only on (seed, stage, step), so that a run that was stopped goes on with `--resume`
exactly as if it had never stopped. See README.md beside this file.
"""

import argparse
import copy
import json
import os
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from hqc.models import digits_path
from hqc.models.classifier import DigitClassifier, load_digit_classifier
from hqc.models.digits_data import DigitSplit, load_digit_split
from hqc.models.ldm import ClassConditionalLDMPipeline, ClassEmbedder

NUM_CLASSES = 10
GUIDANCE_SCALE = 1.5
SAMPLING_STEPS = 20


@dataclass(frozen=True)
class Settings:
    """Everything that the result depends on, besides the versions of the libraries."""

    seed: int = 0
    batch: int = 64
    classifier_steps: int = 600
    classifier_lr: float = 2e-3
    vae_steps: int = 1200
    vae_lr: float = 1e-3
    kl_weight: float = 3e-4  # per latent element, against the mean square error per pixel
    latent_copies: int = 24  # augmented copies of each training image that the UNet sees
    unet_steps: int = 4000
    unet_lr: float = 6e-4
    class_dropout: float = 0.12
    ema_decay: float = 0.999
    evaluation_images: int = 500
    save_every: int = 250
    bfloat16: bool = True

    def quick(self) -> "Settings":
        """The same stages in a few steps: a smoke test, not a model."""
        return replace(
            self,
            batch=8,
            classifier_steps=4,
            vae_steps=3,
            latent_copies=1,
            unet_steps=4,
            evaluation_images=10,
            save_every=2,
            bfloat16=False,
        )


@dataclass(frozen=True)
class Run:
    """Settings of a run and where it keeps its state."""

    settings: Settings
    work_dir: Path
    resume: bool
    stop_at: int | None = None  # end each stage at this step, as if the process had been killed there


class Stopped(Exception):
    """The stage reached `stop_at`; its checkpoint is on disk."""


def step_generator(settings: Settings, stage: str, step: int) -> Generator:
    """The only source of randomness of one training step."""
    return Generator().manual_seed(zlib.crc32(f"{settings.seed}/{stage}/{step}".encode()))


def augment(images: Tensor, generator: Generator) -> Tensor:
    """Small rotations (±8°), scales (±7 %) and shifts (±1.5 pixels) of `[N, 1, 32, 32]` in [-1, 1]."""
    count, size = len(images), images.shape[-1]
    draw = torch.rand(4, count, generator=generator) * 2 - 1
    angle, scale = draw[0] * (8 * torch.pi / 180), 1 + 0.07 * draw[1]
    shift = draw[2:] * (1.5 * 2 / size)
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=-1).view(count, 2, 3)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False).clamp(0, 2) - 1


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    warm = max(1, steps * 3 // 100)
    if step < warm:
        return peak * (step + 1) / warm
    phase = torch.tensor((step - warm) / max(1, steps - warm)) * torch.pi
    return peak * (0.02 + 0.98 * 0.5 * (1 + torch.cos(phase).item()))


def train_stage(
    run: Run,
    stage: str,
    model: nn.Module,
    loss_of: Callable[[nn.Module, Generator], Tensor],
    steps: int,
    lr: float,
) -> dict[str, float]:
    """Train `model` in place with AdamW; it ends with the exponential moving average of its weights.

    The checkpoint `<work_dir>/<stage>.pt` (tensors and numbers only) is written every `save_every` steps.
    """
    settings, path = run.settings, run.work_dir / f"{stage}.pt"
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=1e-4, betas=(0.9, 0.99))
    average = copy.deepcopy(model).requires_grad_(False)
    step, seconds, loss_mean = 0, 0.0, 0.0
    if run.resume and path.is_file():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        step, seconds, loss_mean = state["step"], state["seconds"], state["loss"]
    started = time.perf_counter() - seconds
    bar = tqdm(total=steps, initial=step, desc=stage, mininterval=1.0)
    model.train()
    while step < steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.bfloat16):
            loss = loss_of(model, step_generator(settings, stage, step))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        loss_mean += (loss.item() - loss_mean) * max(0.01, 1 / (step + 1))
        step += 1
        bar.set_postfix_str(f"loss {loss_mean:.4f}", refresh=False)
        bar.update()
        seconds = time.perf_counter() - started
        if step % settings.save_every == 0 or step in (steps, run.stop_at):
            state = {"model": model.state_dict(), "average": average.state_dict()}
            state |= {
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": seconds,
                "loss": loss_mean,
            }
            write_checkpoint(path, state)
        if step == run.stop_at and step < steps:
            raise Stopped(f"{stage} stopped at step {step}")
    bar.close()
    model.load_state_dict(average.state_dict())
    model.eval()
    return {"loss": loss_mean, "seconds": seconds, "steps": steps}


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write beside, then rename: a kill at any moment leaves either the old or the new checkpoint."""
    beside = path.with_suffix(".new")
    torch.save(state, beside)
    os.replace(beside, path)


def train_classifier(run: Run, data: DigitSplit) -> tuple[DigitClassifier, dict[str, float]]:
    """Stage 1: cross-entropy on augmented digits."""
    torch.manual_seed(run.settings.seed)
    classifier = DigitClassifier()

    def loss_of(model: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.train_labels), (run.settings.batch,), generator=generator)
        logits = model(augment(data.train_images[rows], generator))
        return F.cross_entropy(logits.float(), data.train_labels[rows], label_smoothing=0.05)

    settings = run.settings
    report = train_stage(run, "classifier", classifier, loss_of, settings.classifier_steps, settings.classifier_lr)
    return classifier, report


def build_autoencoder() -> AutoencoderKL:
    """KL autoencoder, f = 4: `[N, 1, 32, 32]` ↔ `[N, 3, 8, 8]`."""
    return AutoencoderKL(
        in_channels=1,
        out_channels=1,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 64),
        layers_per_block=1,
        latent_channels=3,
        norm_num_groups=16,
        sample_size=32,
    )


def train_autoencoder(run: Run, data: DigitSplit) -> tuple[AutoencoderKL, dict[str, float]]:
    """Stage 2: mean square error per pixel + weight · KL per latent element."""
    torch.manual_seed(run.settings.seed + 1)
    vae = build_autoencoder()

    def loss_of(model: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(data.train_labels), (run.settings.batch,), generator=generator)
        images = augment(data.train_images[rows], generator)
        posterior = model.encode(images).latent_dist
        mean, logvar = posterior.mean.float(), posterior.logvar.float()
        noise = torch.randn(mean.shape, generator=generator)
        decoded = model.decode(mean + torch.exp(0.5 * logvar) * noise).sample.float()
        divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(decoded, images) + run.settings.kl_weight * divergence

    report = train_stage(run, "vae", vae, loss_of, run.settings.vae_steps, run.settings.vae_lr)
    report["psnr_db_held_out"] = reconstruction_psnr_db(vae, data.test_images)
    return vae, report


@torch.no_grad()
def reconstruction_psnr_db(vae: AutoencoderKL, images: Tensor) -> float:
    """PSNR of decoded posterior means, peak-to-peak 2."""
    decoded = vae.decode(vae.encode(images).latent_dist.mean).sample
    return float(10 * torch.log10(4 / F.mse_loss(decoded, images)))


@torch.no_grad()
def encode_latents(run: Run, vae: AutoencoderKL, data: DigitSplit) -> dict[str, Tensor]:
    """Stage 3: posteriors of augmented training images, their labels, and the scaling factor 1/σ."""
    path = run.work_dir / "latents.safetensors"
    if run.resume and path.is_file():
        return load_file(path)
    means, deviations, labels = [], [], []
    for number in tqdm(range(run.settings.latent_copies), desc="latents"):
        generator = step_generator(run.settings, "latents", number)
        for rows in torch.arange(len(data.train_labels)).split(256):
            posterior = vae.encode(augment(data.train_images[rows], generator)).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
            labels.append(data.train_labels[rows])
    latents = {"mean": torch.cat(means), "std": torch.cat(deviations), "label": torch.cat(labels)}
    variance = latents["mean"].var() + latents["std"].square().mean()
    latents["scaling_factor"] = 1 / variance.sqrt()
    latents = {name: tensor.contiguous() for name, tensor in latents.items()}
    save_file(latents, path)
    return latents


def build_unet() -> UNet2DConditionModel:
    """Denoiser over 8×8, 4×4 and 2×2, with transformers at 4×4 and 2×2; every channel count is n·32."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 96, 128),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=4,  # diffusers reads this as the number of heads
        norm_num_groups=32,
    )


def noise_schedule() -> dict[str, Any]:
    """Arguments that the training and the sampling scheduler share."""
    return {
        "num_train_timesteps": 1000,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.0015,
        "beta_end": 0.0195,
        "prediction_type": "epsilon",
        "clip_sample": False,
    }


def train_unet(run: Run, latents: dict[str, Tensor]) -> tuple[nn.ModuleDict, dict[str, float]]:
    """Stage 4: the DDPM loss ‖ε - ε_θ(z_t, t, class)‖², with the class dropped at random for guidance."""
    settings = run.settings
    torch.manual_seed(settings.seed + 2)
    models = nn.ModuleDict({"unet": build_unet(), "class_embedder": ClassEmbedder(NUM_CLASSES, dim=64)})
    scheduler = DDPMScheduler(**noise_schedule())
    scale = latents["scaling_factor"]

    def loss_of(model: nn.Module, generator: Generator) -> Tensor:
        rows = torch.randint(len(latents["label"]), (settings.batch,), generator=generator)
        mean, std = latents["mean"][rows], latents["std"][rows]
        clean = (mean + std * torch.randn(mean.shape, generator=generator)) * scale
        noise = torch.randn(clean.shape, generator=generator)
        t = torch.randint(1000, (settings.batch,), generator=generator)
        dropped = torch.rand(settings.batch, generator=generator) < settings.class_dropout
        tokens = model["class_embedder"](latents["label"][rows].masked_fill(dropped, NUM_CLASSES))
        noisy = scheduler.add_noise(clean, noise, t)
        predicted = model["unet"](noisy, t, encoder_hidden_states=tokens, return_dict=False)[0]
        return F.mse_loss(predicted.float(), noise)

    return models, train_stage(run, "unet", models, loss_of, settings.unet_steps, settings.unet_lr)


def export_model(
    out: Path, classifier: DigitClassifier, vae: AutoencoderKL, models: nn.ModuleDict, scaling_factor: float
) -> None:
    """Write the diffusers folder and the classifier, all in float16."""
    vae = copy.deepcopy(vae).half()
    vae.register_to_config(scaling_factor=round(scaling_factor, 6))
    scheduler = DDIMScheduler(**noise_schedule(), set_alpha_to_one=False, steps_offset=1)
    parts = {name: copy.deepcopy(model).half() for name, model in models.items()}
    ClassConditionalLDMPipeline(vae=vae, scheduler=scheduler, **parts).save_pretrained(out)
    (out / "classifier").mkdir(exist_ok=True)
    half = {name: tensor.half().contiguous() for name, tensor in classifier.state_dict().items()}
    save_file(half, out / "classifier" / "model.safetensors")


@torch.no_grad()
def accuracy(classifier: DigitClassifier, images: Tensor, labels: Tensor) -> float:
    """Share of images `[N, 1, 32, 32]` in [-1, 1] whose largest logit is their label's."""
    return float((classifier(images).argmax(dim=1) == labels).float().mean())


def evaluate(out: Path, data: DigitSplit, images: int) -> dict[str, float]:
    """Load the shipped float16 folder in float32, measure it, and write `samples.png` (a row per class)."""
    pipeline = ClassConditionalLDMPipeline.from_pretrained(out)
    classifier = load_digit_classifier(out / "classifier" / "model.safetensors")
    labels = torch.arange(images) % NUM_CLASSES
    samples = sample(pipeline, labels, seed=1)
    grid_labels = torch.arange(NUM_CLASSES).repeat_interleave(8)
    grid = sample(pipeline, grid_labels, seed=0).view(NUM_CLASSES, 8, 32, 32)
    pixels = grid.permute(0, 2, 1, 3).reshape(NUM_CLASSES * 32, 8 * 32)
    Image.fromarray(((pixels + 1) * 127.5).round().byte().numpy()).save(out / "samples.png")
    return {
        "classifier_accuracy_held_out": accuracy(classifier, data.test_images, data.test_labels),
        "generated_accuracy": accuracy(classifier, samples, labels),
        "generated_images": images,
    }


def sample(pipeline: ClassConditionalLDMPipeline, labels: Tensor, seed: int) -> Tensor:
    """Images `[N, 1, 32, 32]` in [-1, 1] of the given classes."""
    pipeline.set_progress_bar_config(disable=True)
    generator = Generator().manual_seed(seed)
    images = [
        pipeline(part, SAMPLING_STEPS, GUIDANCE_SCALE, generator=generator, output_type="pt").images
        for part in labels.split(50)
    ]
    return torch.cat(images) * 2 - 1


def train(run: Run, out: Path) -> dict[str, Any]:
    """All stages, the export and the evaluation; returns what is written to `training.json`."""
    run.work_dir.mkdir(parents=True, exist_ok=True)
    data = load_digit_split()
    classifier, classifier_report = train_classifier(run, data)
    vae, vae_report = train_autoencoder(run, data)
    latents = encode_latents(run, vae, data)
    models, unet_report = train_unet(run, latents)
    export_model(out, classifier, vae, models, float(latents["scaling_factor"]))
    report = {
        "settings": asdict(run.settings),
        "stages": {"classifier": classifier_report, "vae": vae_report, "unet": unet_report},
        "parameters": {
            name: sum(parameter.numel() for parameter in model.parameters())
            for name, model in {"classifier": classifier, "vae": vae, **models}.items()
        },
        "sampling": {"scheduler": "DDIM", "steps": SAMPLING_STEPS, "guidance_scale": GUIDANCE_SCALE},
        "measured": evaluate(out, data, run.settings.evaluation_images),
    }
    (out / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, default=Path("digits-training"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=digits_path(), help="the model folder to write")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoints in --work-dir")
    parser.add_argument("--quick", action="store_true", help="a few steps of each stage: a smoke test")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--unet-steps", type=int, default=Settings.unet_steps)
    parser.add_argument("--stop-at", type=int, help="end each stage at this step (to try out --resume)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    settings = Settings(seed=options.seed, unet_steps=options.unet_steps)
    settings = settings.quick() if options.quick else settings
    run = Run(settings, options.work_dir, options.resume, options.stop_at)
    try:
        report = train(run, options.out)
    except Stopped as stopped:
        print(stopped)
        return
    print(json.dumps(report["measured"], indent=2))


if __name__ == "__main__":
    main()
