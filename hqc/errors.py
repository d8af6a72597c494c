"""One tree of errors; every message says where, what was found, what was expected, what to do.

`HqcError.line` is what a user reads: one line of printable characters, of bounded length.
"""

from hqc.wording import printable, shortened

__all__ = [
    "ArtefactError",
    "CaptureError",
    "ComparisonError",
    "EvaluationError",
    "ExportError",
    "HqcError",
    "KernelError",
    "MemoryShortError",
    "OptionError",
    "PassError",
    "PipelineTextError",
    "PlanError",
    "RuntimeMissingError",
    "TrainingError",
    "is_memory_error",
]

LONGEST_LINE = 300
LONGEST_LIST = 900
_LONGEST_PLACE = 100
_LEAST_FOUND = 80
_NO_MEMORY = (
    *("can't allocate memory", "out of memory"),  # torch, on the CPU and on a GPU
    *("bad_alloc", "bad allocation", "Failed to allocate memory"),  # ONNX Runtime
)


class HqcError(Exception):
    """An error that the user can act on: printed in one line by the CLI, exit status 2.

    Args:
        where: the thing at fault (file, pass, site, option).
        found: what was found there, and what was expected.
        do: what to do about it.
        lists: whether `found` names many things, and may be longer for it.
    """

    def __init__(self, where: str, found: str, do: str, *, lists: bool = False) -> None:
        self.where, self.found, self.do, self.lists = where, found, do, lists
        super().__init__(_joined(where, found, do))

    @property
    def line(self) -> str:
        """The message as one line: at most 300 characters, 900 for a list; too long a middle ends in "…"."""
        where, found, do = (printable(text) for text in (self.where, self.found, self.do))
        longest = LONGEST_LIST if self.lists else LONGEST_LINE
        if len(line := _joined(where, found, do)) <= longest:
            return line
        if len(where) > _LONGEST_PLACE:
            where = f"…{where[1 - _LONGEST_PLACE :]}"  # the end of a path says the most
        do = shortened(do, longest - len(where) - _LEAST_FOUND)
        return _joined(where, shortened(found, longest - len(_joined(where, "", do))), do)


def _joined(where: str, found: str, do: str) -> str:
    return f"{where}: {found} {do}" if found.endswith((".", "…")) else f"{where}: {found}. {do}"


def is_memory_error(error: BaseException) -> bool:
    """Whether memory has run out; torch and ONNX Runtime have words of their own for it."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY)


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


class OptionError(HqcError):
    """An option has no effect together with the others, or on the model that was given."""


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
