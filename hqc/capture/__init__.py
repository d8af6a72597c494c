"""Sources into Programs: `trace(source)` finds the denoiser, captures it with torch.export, and checks the result.

Names are imported on first use: a machine that only runs programs needs none of what reading checkpoints does.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.capture.architectures import ARCHITECTURE
    from hqc.capture.export_graph import capture_module
    from hqc.capture.source import Source
    from hqc.capture.sources import find_source, trace

__all__ = ["ARCHITECTURE", "Source", "capture_module", "find_source", "trace"]

_HOMES = {
    "ARCHITECTURE": "architectures",
    "capture_module": "export_graph",
    "Source": "source",
    "find_source": "sources",
    "trace": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'hqc.capture' has no attribute {name!r}")
    return getattr(import_module(f"hqc.capture.{_HOMES[name]}"), name)
