"""What has been measured, one JSON line each, so that a search that was killed measures nothing twice.

Every line has a key of all that decides it: program, recipe, bits, inputs, hqc's own code. Lines with other keys are of
other searches, and stay.
"""

import json
from pathlib import Path

from hqc.atomic import write_file
from hqc.errors import ArtefactError

__all__ = ["Journal"]

_NAME = "measured.jsonl"


class Journal:
    """The file in a work folder, or none. Whoever writes into it has claimed the folder.

    Raises:
        ArtefactError: if the file cannot be read, or is not hqc's.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / _NAME
        self._found: dict[tuple[str, str], float] = {}
        text = self._text()
        self._lines = [line for line in text.splitlines() if self._take(line)]
        self._begun = False
        if text and not self._lines:
            raise ArtefactError(str(self._path), "exists and was not written by hqc", "Choose another --work-dir.")

    def _text(self) -> str:
        if self._path is None or not self._path.exists():
            return ""
        try:
            return self._path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            found = getattr(error, "strerror", None) or "it is no UTF-8 text"
            raise ArtefactError(str(self._path), f"cannot be read ({found})", "Choose another --work-dir.") from error

    def _take(self, line: str) -> bool:
        try:
            data = json.loads(line)
            self._found[str(data["key"]), str(data["site"])] = float(data["error"])
        except (ValueError, LookupError, TypeError):
            return False
        return True

    def get(self, key: str, site: str = "") -> float | None:
        """The error of one site under a key, of all at once under no name; None if it is to be measured."""
        return self._found.get((key, site))

    def add(self, key: str, error: float, site: str = "") -> float:
        """Keeps it.

        Raises:
            ArtefactError: if the folder cannot be written.
        """
        self._found[key, site] = error
        if self._path is None:
            return error
        try:
            if not self._begun:  # what is there, without half a line at its end
                write_file(self._path, "".join(f"{line}\n" for line in self._lines).encode())
                self._begun = True
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "site": site, "error": error}) + "\n")
        except OSError as failure:
            said = f"cannot be written ({failure.strerror})"
            raise ArtefactError(str(self._path), said, "Free some space and start again: it goes on.") from failure
        return error
