"""Program → ONNX: `export_program` for the targets `portable`, `onnxruntime` and `tensorrt`.

Importing this loads nothing heavy.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.export.artefact import EXPORT_KIND, ExportReport, export_program
    from hqc.export.prepare import Target
    from hqc.export.surveys import Survey, survey
    from hqc.export.tensorrt.options import TensorRtOptions

__all__ = ["EXPORT_KIND", "ExportReport", "Survey", "Target", "TensorRtOptions", "export_program", "survey"]

_WHERE = {"Survey": "surveys", "Target": "prepare", "TensorRtOptions": "tensorrt.options", "survey": "surveys"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"hqc.export.{_WHERE.get(name, 'artefact')}"), name)
