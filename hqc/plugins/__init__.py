"""TensorRT plugins of hqc's own nodes: kernels for an export, and their registration. Nothing heavy is imported.

`hqc_qdp` stands on its own and is copied into exports; the rest decides which kernels an export needs, and compiles
them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hqc.plugins.graph import PluginNode, plugin_nodes
    from hqc.plugins.registering import register
    from hqc.plugins.writing import write_plugins

__all__ = ["PluginNode", "plugin_nodes", "register", "write_plugins"]

_WHERE = {"PluginNode": "graph", "plugin_nodes": "graph", "register": "registering", "write_plugins": "writing"}


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'hqc.plugins' has no attribute {name!r}")
    return getattr(import_module(f"hqc.plugins.{_WHERE[name]}"), name)
