"""What a build says of its engines: to people, as JSON, and in report.json."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqc.engines.layers import Coverage, EngineLayer
from hqc.engines.record import EngineRecord
from hqc.memory import bytes_text

__all__ = ["BuiltEngine", "EngineReport"]


@dataclass(frozen=True)
class BuiltEngine:
    """One engine: what build.json says of it, its layers, and how the quantised products came out."""

    record: EngineRecord
    layers: tuple[EngineLayer, ...]
    coverage: Coverage
    cached: bool = False

    def __str__(self) -> str:
        record, found = self.record, self.coverage
        took = "from the cache" if self.cached else f"{record.seconds:.1f} s"
        head = (
            f"{record.file}: {record.arch}, {bytes_text(record.size_bytes)}, {len(self.layers)} layers, {took}; "
            f"INT8 in {found.int8} of {found.products} quantised products"
        )
        lines = [f"  not INT8: {weight}: {why}" for weight, why in found.exceptions]
        lines += [f"  weight-only: {weight}: {how}" for weight, how in found.weight_only]
        return "\n".join([head, *lines])

    def summary(self) -> dict[str, Any]:
        """As JSON data, without the layers."""
        record = self.record
        return {
            "file": record.file,
            "arch": record.arch,
            "builder_version": record.builder_version,
            "size_bytes": record.size_bytes,
            "seconds": record.seconds,
            "peak_resident_bytes": record.peak_resident_bytes,
            "layers": len(self.layers),
            "cached": self.cached,
            **self.coverage.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, for report.json."""
        return {**self.summary(), "layers": [layer.to_dict() for layer in self.layers]}


@dataclass(frozen=True)
class EngineReport:
    """What a build put into a folder."""

    folder: Path
    engines: tuple[BuiltEngine, ...]
    seconds: float

    def __str__(self) -> str:
        count = f"{len(self.engines)} engine{'s' if len(self.engines) != 1 else ''}"
        head = f"{self.folder}: {count}, {self.seconds:.1f} s"
        return "\n".join([head, *map(str, self.engines)])

    def to_dict(self) -> dict[str, Any]:
        """As JSON data, without the layers, which report.json holds."""
        engines = {engine.record.name: engine.summary() for engine in self.engines}
        return {"folder": str(self.folder), "seconds": self.seconds, "engines": engines}
