"""The libraries that draw, which are an extra: refused in one line where they are missing."""

import importlib.util

from hqc.errors import RuntimeMissingError

__all__ = ["require_drawing"]


def require_drawing(library: str, where: str) -> None:
    """Refuses what draws with matplotlib or plotly where that is missing, before any long work.

    Raises:
        RuntimeMissingError: if the library is missing.
    """
    if importlib.util.find_spec(library) is None:
        raise RuntimeMissingError(where, f"{library} is not installed", "Run `pip install 'hqc[report]'`.")
