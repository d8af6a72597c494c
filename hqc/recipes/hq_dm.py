"""HQ-DM: single Hadamard transformation QAT (arXiv 2512.05746), and the variant of its reference implementation."""

from hqc.recipes.recipe import Recipe

__all__ = ["HQ_DM", "HQ_DM_REFERENCE"]

HQ_DM = Recipe(name="hq-dm", source="arXiv 2512.05746", block=32, lora_rank=32, trains=True)

# The reference implementation leaves tokens unrotated, shortcuts and downsamplers float.
HQ_DM_REFERENCE = HQ_DM.model_copy(update={"name": "hq-dm-reference", "rules": "reference", "rotate_tokens": False})
