"""report.json of a TensorRT export: every layer with its form and reason, the options, what the hardware does."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hqc.export.tensorrt.forms import Form, LayerForm
from hqc.export.tensorrt.options import TensorRtOptions
from hqc.export.verification import Verification

__all__ = ["REPORT_FILE", "form_counts", "write_report"]

REPORT_FILE = "report.json"

_INT8 = (
    "Activations of at most 8 bits and rotated weights are int8 in the engine: int8 tensor cores of sm_80 and later do "
    "the arithmetic, whatever the bits of the plan."
)
_INT4 = (
    "int4 tensor-core arithmetic is native on sm_75 to sm_89 only. On Hopper and Blackwell (sm_90 and later) W4A4 is "
    "int8 arithmetic with 4-bit storage."
)
_STORED = (
    "Without plugins rotated weights are stored in 8 bits: H times a 4-bit code does not fit 4 bits. The int4 plugin "
    "stores the codes as they are and rotates them in its kernel."
)


def form_counts(layers: Sequence[LayerForm]) -> str:
    """`60 int8 conv, 17 int8 gemm`, in the order of the forms."""
    counts = Counter(layer.form for layer in layers)
    return ", ".join(f"{counts[form]} {form}" for form in Form if counts[form])


def write_report(
    folder: Path,
    opset: int,
    options: TensorRtOptions,
    layers: Sequence[LayerForm],
    verification: Verification,
    twin: Verification | None,
) -> None:
    """Writes report.json."""
    counts = Counter(str(layer.form) for layer in layers)
    report: dict[str, Any] = {
        "target": "tensorrt",
        "opset": opset,
        "options": asdict(options),
        "interface": "inputs and outputs in float32, whatever the dtype",
        "forms": dict(counts),
        "hardware": [_INT8, _INT4, _STORED],
        "layers": [layer.to_dict() for layer in layers],
        "verification": verification.to_dict(),
        "float32_twin": None if twin is None else twin.to_dict(),
    }
    (folder / REPORT_FILE).write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")
