"""hqc's TensorRT plugins: PTX for several architectures and the Python that hands it to TensorRT.

This package stands on its own: it needs TensorRT 10 or 11, NumPy, and the plugins.json beside it. Build with it:

    import sys; sys.path.insert(0, "EXPORT/plugins")
    import hqc_qdp
    hqc_qdp.register()        # before the ONNX file is parsed

With TensorRT 10.9 or later the engine then holds the kernels and runs without this package, in any process. With an
older one the process that loads the engine calls `register` too.
"""

import importlib
import os
from pathlib import Path
from typing import Any

from .current import CURRENT
from .driver import current_capability
from .problems import MissingError, PluginError
from .table import Kernels, read_table

__all__ = ["MissingError", "PluginError", "ahead_of_time", "register", "register_kernels"]

OLDEST = (10, 0)


def register(folder: str | os.PathLike[str] | None = None) -> None:
    """Makes the nodes of domain hqc known to TensorRT, with the kernels of an export for the GPU here.

    folder: the one with plugins.json; None: that around this package.
    Called again, it takes the kernels of the folder that is given then.

    Raises:
        MissingError: if TensorRT or the GPU is missing, or the driver is too old.
        PluginError: if the kernels are missing or damaged, or none is for this GPU.
    """
    place = Path(__file__).resolve().parents[1] if folder is None else Path(folder)
    _tensorrt()
    register_kernels(read_table(place, current_capability()))


def register_kernels(kernels: Kernels) -> None:
    """The same with kernels from elsewhere.

    Raises:
        MissingError: if TensorRT is missing or too old.
        PluginError: if another copy of this package has registered its plugins.
    """
    trt = _tensorrt()
    if not _Registered.done:
        _refuse_other_copy(trt)
        if ahead_of_time(trt):
            importlib.import_module(f"{__name__}.quick")
        else:
            importlib.import_module(f"{__name__}.version3").register_creators()
        _Registered.done = True
    CURRENT.kernels = kernels


def ahead_of_time(trt: Any) -> bool:
    """Whether this TensorRT takes a plugin's PTX into the engine: 10.9 and later."""
    return hasattr(trt, "QuickPluginCreationRequest")


class _Registered:
    """Whether this process has done it: a plugin cannot be registered twice."""

    done = False


def _tensorrt() -> Any:
    try:
        trt: Any = importlib.import_module("tensorrt")
    except (ImportError, OSError) as error:
        found = f"tensorrt cannot be imported ({error})"
        raise MissingError("TensorRT plugins", found, "Install TensorRT on the machine with the GPU.") from error
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if version < OLDEST:
        raise MissingError("TensorRT plugins", f"tensorrt {trt.__version__} is older than 10.0", "Update it.")
    return trt


def _refuse_other_copy(trt: Any) -> None:
    creators = trt.get_plugin_registry().all_creators
    if any(creator.plugin_namespace == "hqc" for creator in creators):
        found = "this process has hqc's plugins already, from another copy"
        raise PluginError("TensorRT plugins", found, "Use one copy.")
