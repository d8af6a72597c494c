"""Program → ONNX: `export_program` for the targets `portable` and `onnxruntime`. Importing this loads nothing heavy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.export.artefact import EXPORT_KIND, ExportReport, export_program
    from hqc.export.prepare import Target

__all__ = ["EXPORT_KIND", "ExportReport", "Target", "export_program"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module("hqc.export.prepare" if name == "Target" else "hqc.export.artefact"), name)
