"""Images from an exported pipeline with ONNX Runtime and numpy: torch, diffusers and transformers are never imported.

    from hqc.lite import LitePipeline

    pipe = LitePipeline("digits-pipeline")
    pixels = pipe.draw(label=7, seed=0)          # uint8 [H, W], or [H, W, 3]

`hqc export --pipeline` writes such a folder. Nothing in this package may import what a server without torch has not.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.lite.pipeline import LitePipeline

__all__ = ["LitePipeline"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from hqc.lite.pipeline import LitePipeline

    return LitePipeline
