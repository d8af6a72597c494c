"""Sources into Programs: `trace(source)` finds the denoiser, captures it with torch.export, and checks the result."""

from hqc.capture.architectures import ARCHITECTURE
from hqc.capture.export_graph import capture_module
from hqc.capture.source import Source
from hqc.capture.sources import find_source, trace

__all__ = ["ARCHITECTURE", "Source", "capture_module", "find_source", "trace"]
