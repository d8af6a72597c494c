"""One tree of errors; every message says where, what was found, what was expected, what to do."""

__all__ = [
    "ArtefactError",
    "CaptureError",
    "ComparisonError",
    "EvaluationError",
    "ExportError",
    "HqcError",
    "KernelError",
    "MemoryShortError",
    "PassError",
    "PipelineTextError",
    "PlanError",
    "RuntimeMissingError",
    "TrainingError",
]


class HqcError(Exception):
    """An error that the user can act on: printed in one line by the CLI, exit status 2.

    Args:
        where: the thing at fault (file, pass, site, option).
        found: what was found there, and what was expected.
        do: what to do about it.
    """

    def __init__(self, where: str, found: str, do: str) -> None:
        self.where, self.found, self.do = where, found, do
        super().__init__(f"{where}: {found}. {do}" if not found.endswith(".") else f"{where}: {found} {do}")


class CaptureError(HqcError):
    """A source could not be captured into a Program."""


class MemoryShortError(HqcError):
    """What was asked for does not fit the memory that is free."""


class ArtefactError(HqcError):
    """A folder on disk is missing, damaged, of another version, or cannot be written."""


class PlanError(HqcError):
    """Bits, recipe, or layer rules that make no sense for this program."""


class PipelineTextError(HqcError):
    """The text form of a pass pipeline could not be parsed."""


class PassError(HqcError):
    """A pass was applied to a program that it does not take, or produced one that does not verify."""


class TrainingError(HqcError):
    """Calibration or training met something that it cannot go on with."""


class ExportError(HqcError):
    """A program could not be lowered to the target within the bounds that the export guarantees."""


class KernelError(HqcError):
    """A kernel was called with tensors, or asked for options, that it does not take."""


class RuntimeMissingError(HqcError):
    """A runtime or an optional package that the command needs is not installed."""


class ComparisonError(HqcError):
    """Two models cannot be compared with each other."""


class EvaluationError(HqcError):
    """An evaluation was asked for something that the model or the protocol cannot give."""
