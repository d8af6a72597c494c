"""Registers the plugins of an export with TensorRT, in this process."""

from pathlib import Path

from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.paths import StrPath
from hqc.plugins.hqc_qdp import MissingError, PluginError
from hqc.plugins.hqc_qdp import register as register_folder

__all__ = ["PLUGINS_FOLDER", "register"]

PLUGINS_FOLDER = "plugins"


def register(export: StrPath) -> None:
    """Makes hqc's nodes known to TensorRT, with the kernels of an export folder for the GPU here; again for another.

    The Python in the folder is not run: only its PTX is used, checked by the hashes in plugins.json.

    Raises:
        RuntimeMissingError: if TensorRT or the GPU is missing, or the driver is too old for the kernels.
        ArtefactError: if the folder holds no kernels, damaged ones, or none for this GPU.
    """
    try:
        register_folder(Path(export) / PLUGINS_FOLDER)
    except MissingError as error:
        raise RuntimeMissingError(error.where, error.found, error.do) from error
    except PluginError as error:
        raise ArtefactError(error.where, error.found, error.do) from error
