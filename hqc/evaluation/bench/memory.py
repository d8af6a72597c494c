"""What memory this process holds, in bytes. Imported by the workers: psutil and the standard library only."""

import re
import sys
from pathlib import Path

import psutil

from hqc.memory import resident_bytes

__all__ = ["peak_resident_bytes", "resident_bytes"]


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had.

    Linux: VmHWM. Its `ru_maxrss` is not used there: a child starts with that of the process that forked it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_elsewhere()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else _peak_elsewhere()


def _peak_elsewhere() -> int:
    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)  # Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, BSD kilobytes
