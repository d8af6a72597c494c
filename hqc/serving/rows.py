"""Rows of a call as a session takes them: no more than it takes at once, and few different numbers of them."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hqc.runtimes.base import Session

__all__ = ["RowRule", "called"]


@dataclass(frozen=True)
class RowRule:
    """How many rows a call of a session may have: `least` to `most`, and where `few`, a power of two or one of these.

    few: of sessions that keep something costly for every batch size, as a captured graph.
    """

    least: int = 1
    most: int | None = None
    few: bool = False

    @classmethod
    def of(cls, session: Session) -> "RowRule":
        """What a session says: its `batches`, smallest and largest, and `few_batches`; one without them takes any."""
        least, most = getattr(session, "batches", (1, None))
        return cls(least, most, getattr(session, "few_batches", False))

    def parts(self, rows: int) -> list[slice]:
        """Rows in calls of at most `most`.

        >>> RowRule(most=8).parts(10), RowRule().parts(10)
        ([slice(0, 8, None), slice(8, 10, None)], [slice(0, 10, None)])
        """
        most = self.most or rows
        return [slice(start, min(start + most, rows)) for start in range(0, rows, most)]

    def made(self, rows: int) -> int:
        """How many rows a call is made with that needs so many, of at most `most`.

        >>> [RowRule(few=True).made(rows) for rows in (1, 3, 5, 16)], RowRule(4, 6, True).made(2), RowRule().made(3)
        ([1, 4, 8, 16], 4, 3)
        """
        wanted = 1 << (rows - 1).bit_length() if self.few else rows
        return max(rows, self.least, min(wanted, self.most or wanted))


def called(
    run: Callable[..., Tensor], inputs: Mapping[str, Tensor], batched: Collection[str], rows: int, rule: RowRule
) -> Tensor:
    """The output of `run` for all rows, in as many calls as the rule asks for.

    Rows that are missing are copies of the last, whose output is dropped: a row's own does not depend on them.
    """
    outputs = []
    for part in rule.parts(rows):
        count = part.stop - part.start
        missing = rule.made(count) - count
        piece = {name: _filled(value[part], missing) if name in batched else value for name, value in inputs.items()}
        outputs.append(run(**piece)[:count])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _filled(value: Tensor, missing: int) -> Tensor:
    return torch.cat([value, value[-1:].expand(missing, *value.shape[1:])]) if missing else value
