"""LoRA files of tiny models in the namings that libraries write, and the weights that they stand for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from hqc.capture.ldm.names import unet_name
from hqc.program import Program
from hqc.styles.keys import layer_name

__all__ = ["NAMINGS", "Layer", "layers_of", "merged_by_hand", "save_lora", "tensors"]

Naming = Callable[[str], tuple[str, str, str]]


@dataclass(frozen=True)
class Layer:
    """One layer's LoRA: down [r, C, …], up [O, r, …], and alpha, None where the file has none."""

    down: Tensor
    up: Tensor
    alpha: float | None = None

    @property
    def delta(self) -> Tensor:
        """(alpha / r) · up·down, flat: [O, C·kh·kw]."""
        factor = 1.0 if self.alpha is None else self.alpha / len(self.down)
        return factor * (self.up.flatten(1) @ self.down.flatten(1))


def layers_of(program: Program, rank: int = 2, *, alphas: bool = False, seed: int = 3) -> dict[str, Layer]:
    """A LoRA of every layer but the smallest, seeded; ranks and alphas differ from layer to layer."""
    generator, found = torch.Generator().manual_seed(seed), {}
    for number, (site, node) in enumerate(program.sites()):
        shape = program.state[str(node.args[1].target)].shape
        own = rank + number % 2
        if layer_name(site) in found or own > min(shape[0], shape[1:].numel()):
            continue
        down = torch.randn(own, *shape[1:], generator=generator) / shape[1:].numel() ** 0.5
        up = 0.5 * torch.randn(shape[0], own, *[1] * (len(shape) - 2), generator=generator)
        found[layer_name(site)] = Layer(down, up, 1.0 + number % 3 if alphas else None)
    return found


def _dotted(prefix: str, down: str, up: str) -> Naming:
    return lambda name: (f"{prefix}{name}.{down}.weight", f"{prefix}{name}.{up}.weight", f"{prefix}{name}.alpha")


def _kohya(name: str) -> tuple[str, str, str]:
    flat = f"lora_unet_{name.replace('.', '_')}"
    return f"{flat}.lora_down.weight", f"{flat}.lora_up.weight", f"{flat}.alpha"


def _original(name: str) -> tuple[str, str, str]:
    """As kohya names the layers of Stable Diffusion XL. Of two levels, attention in the second."""
    labels = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
    old = labels.get(name) or unet_name(f"{name}.weight", 1, (False, True)).removesuffix(".weight")
    return _kohya(old)


NAMINGS: Mapping[str, Naming] = {
    "diffusers": _dotted("unet.", "lora_A", "lora_B"),
    "peft": _dotted("base_model.model.", "lora_A", "lora_B"),
    "peft with an adapter": _dotted("base_model.model.unet.", "lora_A.default", "lora_B.default"),
    "bare": _dotted("", "lora_A", "lora_B"),
    "earlier diffusers": _dotted("unet.", "lora.down", "lora.up"),
    "comfy": _dotted("diffusion_model.", "lora_down", "lora_up"),
    "kohya": _kohya,
    "kohya original": _original,
}


def tensors(layers: Mapping[str, Layer], naming: str) -> dict[str, Tensor]:
    """What a file holds."""
    found: dict[str, Tensor] = {}
    for name, layer in layers.items():
        down, up, alpha = NAMINGS[naming](name)
        found |= {down: layer.down, up: layer.up}
        if layer.alpha is not None:
            found[alpha] = torch.tensor(layer.alpha)
    return found


def save_lora(path: Path, held: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Writes a file."""
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, path, metadata=metadata)
    return path


def merged_by_hand(program: Program, layers: Mapping[str, Layer], scale: float) -> Program:
    """W + scale · delta, of the captured program's weights."""
    state = dict(program.state)
    for name, layer in layers.items():
        weight = state[f"{name}.weight"]
        state[f"{name}.weight"] = weight + scale * layer.delta.reshape(weight.shape)
    return program.evolve(state=state)
