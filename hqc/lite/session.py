"""One ONNX model of a pipeline folder, called by hqc's names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hqc.errors import ArtefactError
from hqc.export.files import MODEL_FILE
from hqc.export.interface import Interface, interface_of
from hqc.export.ort_session import open_session, run_session, takes_one_timestep
from hqc.lite.arrays import Floats
from hqc.manifests import read_json

__all__ = ["LiteSession", "open_part", "shape_of"]

_TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class LiteSession:
    """A model in ONNX Runtime on the CPU. interface: what its inputs and its output are called."""

    def __init__(self, folder: Path, interface: Interface, threads: int | None) -> None:
        """Raises ArtefactError if the model cannot be run."""
        self._interface = interface
        self._session = open_session(folder / MODEL_FILE, threads=threads)
        self._one_timestep = takes_one_timestep(self._session)
        self._types: dict[str, Any] = {}
        for value in self._session.get_inputs():
            if value.type not in _TYPES:
                raise ArtefactError(str(folder), f"takes a {value.type} as {value.name}", "Export it again.")
            self._types[value.name] = _TYPES[value.type]

    @property
    def outputs(self) -> tuple[str, ...]:
        """The file's names of all of them."""
        return tuple(value.name for value in self._session.get_outputs())

    def __call__(self, **named: Any) -> Floats:
        """The output, by hqc's names of the inputs."""
        return self.several([self._interface.output], **named)[0]

    def several(self, outputs: Sequence[str], **named: Any) -> list[Floats]:
        """Some outputs by the file's names, by hqc's names of the inputs."""
        feeds = self._interface.feeds(named)
        typed = {name: np.ascontiguousarray(feeds[name], self._types[name]) for name in self._types}
        found = run_session(self._session, outputs, typed, one_timestep=self._one_timestep)
        return [np.asarray(value, np.float32) for value in found]


def open_part(folder: Path, threads: int | None, interface: Interface | None = None) -> LiteSession:
    """A model that `export_program` wrote: its own manifest has the names. interface: of another one.

    Raises:
        ArtefactError: if it is missing or damaged.
    """
    if interface is None:
        interface = interface_of(part_manifest(folder), folder)
    return LiteSession(folder, interface, threads)


def part_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a part; its hashes are the pipeline's.

    Raises:
        ArtefactError: if there is none.
    """
    found = read_json(folder / "manifest.json")
    if not isinstance(found, dict):
        raise ArtefactError(str(folder / "manifest.json"), "is no manifest", "Export the pipeline again.")
    return found


def shape_of(manifest: Mapping[str, Any], name: str, where: Path) -> tuple[int, ...]:
    """The shape of an input without its batch axis.

    Raises:
        ArtefactError: if the manifest does not say it.
    """
    try:
        shape = next(spec["shape"] for spec in manifest["inputs"] if spec["name"] == name)
        found = tuple(int(size) for size in shape[1:])
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise ArtefactError(str(where), f"says no shape of {name}", "Export the pipeline again.") from error
    if not found or min(found) < 1:
        raise ArtefactError(str(where), f"has the shape {found} for {name}", "Export the pipeline again.")
    return found
