"""What memory this process holds, in bytes. Imported by the workers: psutil and the standard library only."""

from hqc.memory import peak_resident_bytes, resident_bytes

__all__ = ["peak_resident_bytes", "resident_bytes"]
