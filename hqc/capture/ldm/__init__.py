"""Original latent-diffusion checkpoints (CompVis naming) as sources: a weights file and its YAML configuration."""

from hqc.capture.ldm.source import from_checkpoint

__all__ = ["from_checkpoint"]
