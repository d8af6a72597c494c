"""Is there enough memory for what is about to start? Said before it starts, with the numbers.

    available = min(MemAvailable of the machine, limit - use of every control group above this process)
    needed    = an estimate by the caller, from the bytes of weights and the live activations

`HQC_IGNORE_MEMORY=1` in the environment goes on anyway: an estimate may be wrong.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hqc.errors import MemoryShortError

__all__ = ["available_bytes", "bytes_text", "parameter_bytes", "require_memory", "unet_activation_bytes"]

IGNORE = "HQC_IGNORE_MEMORY"


def require_memory(what: str, needed: int, do: str = "") -> None:
    """Refuses to start what needs more memory than there is.

    Raises:
        MemoryShortError: with both numbers, and `do` or what helps in general.
    """
    available = available_bytes()
    if available is None or needed <= available or os.environ.get(IGNORE) == "1":
        return
    raise MemoryShortError(
        what,
        f"needs about {bytes_text(needed)} of memory and {bytes_text(available)} are available",
        f"{do or 'Use a smaller batch, close other programs, or take a larger machine'}; {IGNORE}=1 goes on anyway.",
    )


def bytes_text(count: int) -> str:
    """Bytes in the unit that people use for memory.

    >>> bytes_text(900), bytes_text(1_700_000_000)
    ('900 B', '1.7 GB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def available_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that this process can still take without being killed; None where the system does not say.

    root: where /proc and /sys lie.
    """
    found = [*_machine(root), *_control_groups(root)]
    return max(0, min(found)) if found else None


def _machine(root: Path) -> Iterator[int]:
    try:
        for line in (root / "proc/meminfo").read_text(encoding="ascii").splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                yield int(value.split()[0]) * 1024
    except (OSError, ValueError, IndexError):
        return


def _control_groups(root: Path) -> Iterator[int]:
    """What each control group from this process's own to the root leaves; version 2, then version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") >= 2 else ("", "none", "")
        if controllers == "":
            yield from _chain(root / "sys/fs/cgroup", path, ("memory.max", "memory.current", "inactive_file"))
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _chain(root / "sys/fs/cgroup/memory", path, names)


def _chain(mount: Path, path: str, names: tuple[str, str, str]) -> Iterator[int]:
    limit_name, use_name, cache_name = names
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for depth in range(len(parts) + 1):
        group = mount.joinpath(*parts[:depth])
        limit, use = _number(group / limit_name), _number(group / use_name)
        if limit is not None and use is not None:
            yield limit - max(0, use - _stat(group / "memory.stat", cache_name))


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))  # "max" is no number: no limit
    except (OSError, ValueError):
        return None


def _stat(path: Path, name: str) -> int:
    """A field of memory.stat: cached files that the kernel drops when memory is short count as free."""
    try:
        fields = dict(line.split(maxsplit=1) for line in path.read_text(encoding="ascii").splitlines())
        return int(fields.get(name, 0))
    except (OSError, ValueError):
        return 0


def parameter_bytes(module: Any, itemsize: int = 4) -> int:
    """Bytes of a torch module's parameters at so many bytes each; the module may lie on the meta device."""
    return int(sum(parameter.numel() for parameter in module.parameters())) * itemsize


def unet_activation_bytes(config: Mapping[str, Any], batch: int) -> int:
    """Live float32 activations of one UNet call: every skip connection, and a dozen of the largest feature map.

    config: diffusers' `block_out_channels`, `layers_per_block` and `sample_size`.
    """
    channels, layers = tuple(config["block_out_channels"]), config["layers_per_block"]
    sides = config["sample_size"]
    height, width = (sides, sides) if isinstance(sides, int) else sides
    maps = [c * height * width // 4**i for i, c in enumerate(channels)]
    skips = sum(size * ((layers if isinstance(layers, int) else layers[i]) + 1) for i, size in enumerate(maps))
    return int(4 * batch * (skips + 12 * max(maps)))
