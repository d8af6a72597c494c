"""Files of prompts. Importing this loads nothing heavy."""

import re
from pathlib import Path

from hqc.errors import TrainingError
from hqc.paths import StrPath

__all__ = ["read_prompts"]

_LARGEST_FILE = 64 * 2**20


def read_prompts(path: StrPath) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; empty lines are left out.

    Raises:
        TrainingError: if it cannot be read, is no UTF-8 text, or holds no prompt.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)
    except OSError as error:
        raise TrainingError(str(path), f"cannot be read ({error.strerror})", "Check the path.") from error
    if len(content) > _LARGEST_FILE:
        raise TrainingError(str(path), f"is larger than {_LARGEST_FILE // 2**20} MiB", "Give a part of it.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise TrainingError(str(path), f"is no UTF-8 text ({found})", "Save it as UTF-8.") from error
    prompts = tuple(line.strip() for line in re.split(r"[\r\n]+", text) if line.strip())
    if not prompts:
        raise TrainingError(str(path), "holds no prompt", "Write one prompt a line.")
    return prompts
