"""What every public function takes for a path."""

import os
from typing import TypeAlias

__all__ = ["StrPath"]

StrPath: TypeAlias = str | os.PathLike[str]
"""Text or a path object; `Path(…)` of it is the first thing that a function does."""
