"""One call of a denoiser as several side by side, each with a part of the rows."""

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

__all__ = ["Split", "parts_of"]


class Split:
    """Runs calls of one denoiser, which may be called by several threads at once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(thread_name_prefix="hqc-split")  # its threads begin when they are needed

    def __call__(
        self, run: Callable[..., Any], inputs: Mapping[str, Any], batched: Collection[str], rows: int, at_once: int
    ) -> list[Any]:
        """The outputs of `run` by parts of the rows, in their order.

        batched: the names of those inputs that have rows; the others are every part's. at_once: how many parts, of
        which the first runs in this thread.
        """
        parts = [
            {name: value[part] if name in batched else value for name, value in inputs.items()}
            for part in parts_of(rows, at_once)
        ]
        if len(parts) == 1:
            return [run(**parts[0])]
        others = [self._pool.submit(run, **part) for part in parts[1:]]
        return [run(**parts[0]), *(other.result() for other in others)]


def parts_of(rows: int, count: int) -> list[slice]:
    """Rows in at most so many parts, none empty, the larger ones first.

    >>> parts_of(5, 2), parts_of(1, 2)
    ([slice(0, 3, None), slice(3, 5, None)], [slice(0, 1, None)])
    """
    count = min(rows, count)
    sizes = [rows // count + (part < rows % count) for part in range(count)]
    ends = [sum(sizes[: part + 1]) for part in range(count)]
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
