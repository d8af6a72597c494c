"""The kernels that the plugins of this process use.

TensorRT keeps one registry a process, and a plugin in it cannot be replaced. So the plugins are registered once, and
look their kernels up here whenever a network is built.
"""

from .problems import PluginError
from .table import Kernel, Kernels

__all__ = ["CURRENT", "Current"]


class Current:
    """The kernels of the export that was registered last."""

    def __init__(self) -> None:
        self.kernels: Kernels | None = None

    def tactics(self, key: str) -> tuple[Kernel, ...]:
        """See `Kernels`.

        Raises:
            PluginError: also if no export was registered.
        """
        if self.kernels is None:
            raise PluginError("TensorRT plugins", "no kernels are registered", "Call register(FOLDER) first.")
        return self.kernels.tactics(key)


CURRENT = Current()
