"""What a TensorRT export can be asked for."""

from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from hqc.errors import ExportError
from hqc.kernels.compile import ARCHITECTURES

__all__ = ["Dtype", "Plugins", "Rotation", "TensorRtOptions"]

Dtype = Literal["fp16", "bf16", "fp32"]
Plugins = Literal["none", "qdp"]
Rotation = Literal["conv", "matmul"]

_TYPES = {"fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16, "fp32": ir.DataType.FLOAT}
_ROUNDING = {"fp16": 2.0**-11, "bf16": 2.0**-8, "fp32": 0.0}


@dataclass(frozen=True)
class TensorRtOptions:
    """dtype of activations between the sites; standard operators only, or nodes that plugins take.

    plugins: `none` builds with every TensorRT from 10 on and with TensorRT-RTX. `qdp` writes `hqc::HadamardQuantize`,
        `hqc::HadamardQuantizeBounded`, `hqc::Int4Linear` and `hqc::Int4Conv`, each with a function body for runtimes
        without the plugin.
    image_rotation: how [N, C, H, W] is rotated, as a grouped 1×1 convolution (stays in NHWC inside an engine, one
        kernel) or as a product between two reshapes. token_rotation: the same for […, C], where the product is
        between reshapes that move nothing.
    weight_only: wildcards over site names; linear layers that match, with weights of at most 4 bits, keep their
        activations in `dtype` and store INT4 weights.
    plugin_archs: the GPUs, "sm_80" … "sm_120", that the plugins' kernels are compiled for; none of them: the folder has
        no kernels, and only runtimes that take the bodies run it (`hqc.plugins.write_plugins` writes them later).

    Raises:
        ExportError: for a value that does not exist.
    """

    dtype: Dtype = "fp16"
    plugins: Plugins = "none"
    image_rotation: Rotation = "conv"
    token_rotation: Rotation = "matmul"
    weight_only: tuple[str, ...] = ()
    plugin_archs: tuple[str, ...] = tuple(ARCHITECTURES)

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", get_args(Dtype)),
            ("plugins", get_args(Plugins)),
            ("image_rotation", get_args(Rotation)),
            ("token_rotation", get_args(Rotation)),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ExportError(f"{name} {value!r}", f"unknown; there are {', '.join(known)}", "Use one of them.")
        if unknown := [arch for arch in self.plugin_archs if arch not in ARCHITECTURES]:
            raise ExportError(
                f"plugins for {unknown[0]}",
                f"there are kernels for {', '.join(ARCHITECTURES)}",
                "Use some of them, or export with --plugins none.",
            )

    @property
    def onnx_type(self) -> ir.DataType:
        """`dtype` in ONNX."""
        return _TYPES[self.dtype]

    @property
    def rounding(self) -> float:
        """The largest relative error of one rounding to `dtype`; 0 for fp32, the reference's own type."""
        return _ROUNDING[self.dtype]
