"""The `onnxruntime` runtime: an export folder, run by ONNX Runtime on the CPU."""

from pathlib import Path

import torch
from torch import Tensor

from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.export.artefact import EXPORT_KIND
from hqc.export.interface import interface_of
from hqc.export.model import MODEL_FILE
from hqc.export.ort_session import open_session, run_session, takes_one_timestep
from hqc.paths import StrPath
from hqc.program import InputSpec
from hqc.runtimes.base import named_inputs
from hqc.runtimes.ort_cache import optimised_model
from hqc.storage import check_manifest

__all__ = ["OrtSession"]


class OrtSession:
    """Runs model.onnx of a folder whose every hash has been checked."""

    name = "onnxruntime"

    def __init__(
        self, folder: StrPath, *, threads: int | None = None, optimisation: str = "all", cache: StrPath | None = None
    ) -> None:
        """threads: of one call; None leaves the choice to the runtime. cache: of optimised models, see `ort_cache`.

        Raises:
            ArtefactError: if the folder is missing, damaged, or not an export.
            RuntimeMissingError: if onnxruntime is not installed, or has no kernels for the export.
        """
        folder = Path(folder)
        manifest = check_manifest(folder, EXPORT_KIND)
        if MODEL_FILE not in manifest["files"]:
            raise ArtefactError(str(folder), f"lists no {MODEL_FILE}", "Export it again.")
        try:
            specs = [InputSpec.from_dict(spec) for spec in manifest["inputs"]]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtefactError(str(folder), f"has a manifest without inputs ({error})", "Export it again.") from error
        self.inputs = tuple(specs)
        self._interface = interface_of(manifest, folder)
        if manifest.get("tensorrt", {}).get("dtype") == "bf16":
            raise RuntimeMissingError(
                f"runtime {self.name}",
                f"{folder} is in bfloat16, which it has no kernels for",
                "Build an engine of it.",
            )
        model = folder / MODEL_FILE
        if cache is not None:
            model, optimisation = optimised_model(folder, manifest["files"], Path(cache)), "disabled"
        self._session = open_session(model, threads=threads, optimisation=optimisation)
        self.one_timestep = takes_one_timestep(self._session)
        self._taken = frozenset(value.name for value in self._session.get_inputs())

    def __call__(
        self, sample: Tensor, timestep: Tensor | float | None = None, *conditions: Tensor | None, **named: Tensor | None
    ) -> Tensor:
        """See `Session`."""
        given = named_inputs(self.inputs, sample, timestep, *conditions, **named)
        feeds = {name: t.numpy() for name, t in self._interface.feeds(given).items() if name in self._taken}
        found = run_session(self._session, [self._interface.output], feeds, one_timestep=self.one_timestep)
        return torch.from_numpy(found[0])
