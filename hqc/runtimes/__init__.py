"""Running what hqc wrote: `load(path)` gives a `Model`. Importing this loads nothing heavy."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.runtimes.base import Session
    from hqc.runtimes.model import Model, Runtime, load
    from hqc.runtimes.unet import as_unet

__all__ = ["Model", "Runtime", "Session", "as_unet", "load"]

_HOMES = {"Session": "base", "as_unet": "unet"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from importlib import import_module

    return getattr(import_module(f"hqc.runtimes.{_HOMES.get(name, 'model')}"), name)
