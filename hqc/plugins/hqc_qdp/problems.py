"""What the plugins refuse, in one line: where, what was found, what to do."""

__all__ = ["MissingError", "PluginError"]


class PluginError(Exception):
    """The plugins do not fit a node, an export, or each other."""

    def __init__(self, where: str, found: str, do: str) -> None:
        self.where, self.found, self.do = where, found, do
        super().__init__(f"{where}: {found}. {do}")


class MissingError(PluginError):
    """What the plugins need is not on this machine."""
