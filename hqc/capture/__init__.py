"""Sources into Programs: `trace(source)` finds the denoiser, captures it with torch.export, and checks the result."""

from hqc.capture.export_graph import capture_module
from hqc.capture.sources import Source, find_source, trace

__all__ = ["Source", "capture_module", "find_source", "trace"]
