"""Whose a work folder is, and which outputs were written from it: what `comparison.json` in it says."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hqc.atomic import is_stream, refuse_existing_file, write_file
from hqc.errors import ArtefactError

__all__ = ["Record"]

_FILE, _FORMAT = "comparison.json", "hqc-comparison"


class Record:
    """The work folder of comparisons on one program. Outputs that it wrote may be replaced while nobody changed them.

    source: the files of the program, see `subject.source_files`.
    """

    def __init__(self, folder: Path, source: Mapping[str, str]) -> None:
        self._path = folder / _FILE
        self._program = _sha256(json.dumps(dict(source), sort_keys=True).encode())

    def check(self) -> None:
        """Refuses the work folder of another program.

        Raises:
            ArtefactError: if it is one, or something else.
        """
        data = self._data()
        if data is not None and data.get("program") != self._program:
            raise ArtefactError(
                str(self._path.parent), "is the work folder of another program", "Choose another --work-dir."
            )

    def check_output(self, output: Path, *, force: bool) -> None:
        """Refuses a file that is there, unless this folder's last run wrote it as it is.

        Raises:
            ArtefactError: if it is there.
        """
        if not is_stream(output):
            refuse_existing_file(output, force=force or self._wrote(output))

    def begin(self) -> None:
        """Makes the folder this program's."""
        if self._data() is None:
            self._save({})

    def write(self, output: Path, data: bytes) -> None:
        """Writes an output, and remembers it: what it was and what it becomes, in case of a kill between the two."""
        if not is_stream(output):
            hashes = self._outputs()
            own = [*hashes.get(_name(output), [])[-1:], _sha256(data)]
            self._save({**hashes, _name(output): own})
        write_file(output, data)

    def _wrote(self, output: Path) -> bool:
        try:
            found = _sha256(output.read_bytes())
        except OSError:
            return False
        return found in self._outputs().get(_name(output), [])

    def _outputs(self) -> dict[str, list[str]]:
        found = (self._data() or {}).get("outputs", {})
        return {str(k): [str(one) for one in v] for k, v in found.items() if isinstance(v, list)}

    def _data(self) -> dict[str, Any] | None:
        """What is there; None where nothing is."""
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise self._foreign() from error
        if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get("outputs"), dict):
            raise self._foreign()
        return found

    def _foreign(self) -> ArtefactError:
        return ArtefactError(str(self._path), "is not one that hqc wrote", "Choose another --work-dir.")

    def _save(self, outputs: Mapping[str, Any]) -> None:
        data = {"format": _FORMAT, "program": self._program, "outputs": dict(outputs)}
        write_file(self._path, (json.dumps(data, indent=1) + "\n").encode())


def _name(output: Path) -> str:
    return str(output.resolve())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
