"""The bundled model `digits`: where its files lie. Importing this package loads nothing heavy."""

from pathlib import Path

__all__ = ["digits_classifier_path", "digits_path"]


def digits_path() -> Path:
    """Folder of the bundled latent diffusion model, in diffusers layout (`model_index.json`, `unet/`, …)."""
    return Path(__file__).parent / "digits"


def digits_classifier_path() -> Path:
    """Safetensors file with the weights of the digit classifier that measures the bundled model."""
    return digits_path() / "classifier" / "model.safetensors"
