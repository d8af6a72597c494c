"""What a build is asked for: the range of batches and the builder's settings."""

from dataclasses import asdict, dataclass, field
from typing import Any

from hqc.errors import ExportError

__all__ = ["BatchProfile", "BuildOptions"]


@dataclass(frozen=True)
class BatchProfile:
    """The batches that an engine takes, `min`…`max`, and the one that it is optimised for.

    Two by default: a sampler's call with classifier-free guidance for one image.
    """

    min: int = 1
    opt: int = 2
    max: int = 8

    def __post_init__(self) -> None:
        """Raises:
        ExportError: unless 1 ≤ min ≤ opt ≤ max.
        """
        if not 1 <= self.min <= self.opt <= self.max:
            raise ExportError(
                f"profile of batches {self}",
                "is no range; expected 1 ≤ min ≤ opt ≤ max",
                "Give --min-batch, --opt-batch and --max-batch in that order.",
            )

    def __str__(self) -> str:
        return f"{self.min}…{self.opt}…{self.max}"

    @staticmethod
    def of(low: int, opt: int | None, high: int) -> "BatchProfile":
        """The profile; without `opt`, the one of the class, moved into the range.

        Raises:
            ExportError: if it is no range.
        """
        return BatchProfile(low, min(max(BatchProfile.opt, low), high) if opt is None else opt, high)


@dataclass(frozen=True)
class BuildOptions:
    """Settings of a build; every field is part of an engine's key.

    workspace_bytes: scratch memory that a kernel may take; None leaves it to the builder.
    tf32: float32 products may round their operands to 10 bits of mantissa, on tensor cores, as the builders do unless
        told otherwise. What was float16 before a rotation loses nothing by it.
    """

    profile: BatchProfile = field(default_factory=BatchProfile)
    workspace_bytes: int | None = None
    tf32: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As JSON data."""
        return asdict(self)
