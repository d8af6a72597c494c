"""Is there enough memory for what is about to start? Said before it starts, with the numbers.

    available = min(MemAvailable of the machine, limit - use of every control group above this process)
    needed    = an estimate by the caller, from the bytes of weights and the live activations

`HQC_IGNORE_MEMORY=1` in the environment goes on anyway: an estimate may be wrong.
"""

import ctypes
import gc
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hqc.errors import MemoryShortError
from hqc.sizes import sides

__all__ = [
    "activation_bytes",
    "available_bytes",
    "bytes_text",
    "export_bytes",
    "peak_resident_bytes",
    "reconstruction_bytes",
    "require_call_memory",
    "require_memory",
    "resident_bytes",
    "return_free_memory",
    "stored_parameters",
    "trace_bytes",
    "training_bytes",
    "unet_activation_bytes",
]

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


def require_call_memory(what: str, program: Any, rows: int, do: str) -> None:
    """Refuses to start what calls a denoiser on so many rows, if they do not fit beside a second copy of its weights.

    do: what makes the rows fewer.

    Raises:
        MemoryShortError: with the numbers.
    """
    needed = program.size_bytes() + activation_bytes(program.graph, rows)
    require_memory(what, needed, f"{do}, close other programs, or take a larger machine")


def bytes_text(count: int) -> str:
    """Bytes in the unit that people use for memory.

    >>> bytes_text(900), bytes_text(1_700_000_000)
    ('900 B', '1.7 GB')
    """
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def resident_bytes() -> int:
    """Bytes of memory that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        import psutil  # a server without torch has none on Linux

        return int(psutil.Process().memory_info().rss)


def peak_resident_bytes() -> int:
    """The largest resident set that this process has had.

    Linux: VmHWM. Its `ru_maxrss` is not used there: a child starts with that of the process that forked it.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return _peak_elsewhere()
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else _peak_elsewhere()


def _peak_elsewhere() -> int:
    import psutil

    info = psutil.Process().memory_info()
    if hasattr(info, "peak_wset"):
        return int(info.peak_wset)  # Windows
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, BSD kilobytes


_GROWTH = 2**28
_LARGE_PROCESS = 2**32
_resident_after = 0  # what the last return left


def return_free_memory(above: int = 2**30) -> None:
    """Gives what is free inside a process of more than `above` bytes back to the system, where the C library can.

    Below 4 GiB only if the process has grown by 256 MiB since the last time: a full collection takes a second of a
    process with many objects.
    """
    global _resident_after
    resident = resident_bytes()
    _resident_after = min(_resident_after, resident)
    if resident < max(above, min(_LARGE_PROCESS, _resident_after + _GROWTH)):
        return
    gc.collect()  # graphs are cycles
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
    _resident_after = resident_bytes()


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


def trace_bytes(parameters: int, config: Mapping[str, Any]) -> int:
    """What capturing a denoiser takes: its weights once, torch.export's own 0.4 GB, a UNet's activations at batch 3.

    config: diffusers'; a transformer's activations are small beside its weights and are left out.
    Measured against: LDM-4 2.1 GB (estimate 2.5), LDM-8 1.5 GB (estimate 1.8).
    """
    weights = 4 * parameters
    is_unet = all(config.get(key) for key in ("block_out_channels", "layers_per_block", "sample_size"))
    activations = unet_activation_bytes(config, batch=3) if is_unet else 0
    return weights + weights // 10 + _EXPORT_BYTES + 2 * activations


def stored_parameters(folder: Path, stem: str = "diffusion_pytorch_model") -> int:
    """Parameters in a model folder, from the headers of its safetensors files; 0 where none can be read.

    stem: how the files are named: diffusers' way, or "model" for transformers.
    """
    from safetensors import SafetensorError, safe_open

    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        if not re.fullmatch(rf"{stem}(-\d+-of-\d+)?\.safetensors", path.name):
            continue  # a variant, which is not loaded
        try:
            with safe_open(path, framework="pt") as file:
                count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
        except (OSError, SafetensorError):
            return 0  # whoever loads it says what is wrong
    return count


def unet_activation_bytes(config: Mapping[str, Any], batch: int) -> int:
    """Live float32 values of one UNet call: every skip connection, and a dozen of the largest feature map.

    config: diffusers' `block_out_channels`, `layers_per_block` and `sample_size`.
    """
    channels, layers = tuple(config["block_out_channels"]), config["layers_per_block"]
    height, width = sides(config["sample_size"])
    maps = [c * height * width // 4**i for i, c in enumerate(channels)]
    skips = sum(size * ((layers if isinstance(layers, int) else layers[i]) + 1) for i, size in enumerate(maps))
    return int(4 * batch * (skips + 12 * max(maps)))


_EXPORT_BYTES = 400_000_000
_WORKSPACE = 3
_ITEM_BYTES = {"float64": 8, "int64": 8, "float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1, "bool": 1}


def activation_bytes(graph: Any, batch: int) -> int:
    """Bytes that one run of a Program's fx graph takes on top of its weights.

    The most values that are alive at once, each from its node to its last user, times 3 for the workspaces of
    convolutions and the allocator's slack: 2.5 to 2.8 were measured on LDM-4 at batches 2 and 6.
    """
    uses = Counter({node: len(node.users) for node in graph.nodes})
    sizes = {node: 0 if node.op == "get_attr" else _value_bytes(node.meta, batch) for node in graph.nodes}
    alive = most = 0
    for node in graph.nodes:
        alive += sizes[node]
        most = max(most, alive)
        for used in node.all_input_nodes:
            uses[used] -= 1
            alive -= sizes[used] if uses[used] == 0 else 0
    return _WORKSPACE * most


def export_bytes(program: Any, samples: int) -> int:
    """Bytes that an export and its verification take on top of the program's own weights.

    A quantised weight has its codes (1 byte) while the model is written and 4 bytes while a runtime folds it; a float
    one is mapped once and packed once (2 × 4 bytes). Verification runs `samples` at a time.
    """
    each: int = 4 if program.plan.quantised else 2 * 4
    parameters = sum(int(tensor.numel()) for tensor in program.state.values())
    return each * parameters + activation_bytes(program.graph, samples)


def training_bytes(program: Any, rows: int) -> int:
    """Bytes that distilling a captured program takes on top of its weights, at so many rows a call.

    Every value is kept for the backward pass, those in front of a layer twice more (rotated, quantised); of every
    weight there are the quantised one, LoRA's and what both need to learn. Measured against: `digits` at 8, 32 and 96
    rows 94, 180 and 442 MB (estimate 108, 219, 515).
    """
    values = sum(_value_bytes(node.meta, rows) for node in program.graph.nodes if node.op == "call_function")
    return values + 3 * values // 4 + 4 * int(program.size_bytes())


def reconstruction_bytes(program: Any, units: Sequence[Any], samples: int, rows: int) -> int:
    """Bytes that reconstructing a captured program's units takes on top of its weights, so many rows a step.

    Its rewritten weights; of all samples the values that are alive at one place, of both graphs, with a unit's inputs
    and outputs; of the largest unit every value of a step and its gradient, and of its weights a dozen copies (levels,
    α with gradient and moments, shares, codes, and what the sum over them keeps). Measured against: `digits` on 640
    samples at 32 rows 233 MB (estimate 320).
    """
    largest = 0
    for unit in units:
        values = sum(_value_bytes(node.meta, rows) for node in unit.graph.nodes if node.op == "call_function")
        largest = max(largest, 2 * values + 12 * int(unit.size_bytes()))
    return int(program.size_bytes()) + activation_bytes(program.graph, samples) + largest


def _value_bytes(meta: Mapping[str, Any], batch: int) -> int:
    shape = meta.get("shape", (0,))
    return _ITEM_BYTES.get(str(meta.get("dtype")), 4) * math.prod(_dimension(d, batch) for d in shape)


def _dimension(dimension: int | str, batch: int) -> int:
    """A number, or an expression in the batch such as 4*N: the product of all that stands in it is large enough."""
    if isinstance(dimension, int):
        return dimension
    return math.prod(batch if part == "N" else max(1, int(part)) for part in re.findall(r"\d+|N", dimension))
