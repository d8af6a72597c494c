"""`write_plugins`: the kernels that an export's plugin nodes need, compiled for every architecture, beside the model.

    EXPORT/plugins/plugins.json   variants with their kernels, launch parameters, digests; see `hqc_qdp.table`
    EXPORT/plugins/*.ptx          one file a kernel and architecture
    EXPORT/plugins/hqc_qdp/       the Python that hands them to TensorRT, without hqc

No GPU is needed. An engine's key holds a digest of all of it.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.metadata import version
from math import prod
from pathlib import Path
from typing import Any, TypeAlias

import onnx

from hqc import __version__
from hqc.errors import ExportError
from hqc.kernels.ahead import compiled_ahead
from hqc.kernels.compile import ARCHITECTURES, CompiledKernel, compile_kernel
from hqc.paths import StrPath
from hqc.plugins.graph import PluginNode, plugin_nodes
from hqc.plugins.hqc_qdp.nodes import Variant
from hqc.plugins.hqc_qdp.table import FORMAT, PLUGINS_FILE, VERSION
from hqc.plugins.registering import PLUGINS_FOLDER
from hqc.plugins.tactics import Tactic, tactics

__all__ = ["MAX_SHARED_BYTES", "OnKernel", "variants_of", "write_plugins"]

MAX_SHARED_BYTES = 48 * 1024
"""Dynamic shared memory that every launch may have. For more a launcher must ask the driver, and whether TensorRT does
is documented nowhere."""

OnKernel: TypeAlias = Callable[[int, int, str], None]

STANDALONE = Path(__file__).with_name("hqc_qdp")


def write_plugins(
    export: StrPath,
    model: StrPath,
    archs: Sequence[str] = ARCHITECTURES,
    *,
    on_kernel: OnKernel | None = None,
) -> list[Path]:
    """Writes EXPORT/plugins for the plugin nodes of a model; the files that were written, none if it has no such node.

    archs: of `hqc.kernels.compile.ARCHITECTURES`. on_kernel: called before each kernel, with how many are compiled, how
    many there are, and its name; and once at the end.

    Raises:
        ExportError: for a node that no kernel takes, or a kernel that does not fit a plugin.
        KernelError: for an architecture that there are no kernels for.
        RuntimeMissingError: if triton is not installed.
    """
    found = variants_of(plugin_nodes(onnx.load(str(model), load_external_data=False)))
    if not found:
        return []
    folder = Path(export) / PLUGINS_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[str, list[str]] = {}
    built: dict[str, Tactic] = {}
    for key, (variant, places) in sorted(found.items()):
        chosen = tactics(variant, places)
        names[key] = [_name(tactic) for tactic in chosen]
        built |= {_name(tactic): tactic for tactic in chosen}
    kernels, files = {}, []
    jobs = [(t.kernel, t.dtype, t.plain_options(), arch) for _, t in sorted(built.items()) for arch in archs]
    with compiled_ahead(jobs):
        for done, (name, tactic) in enumerate(sorted(built.items())):
            if on_kernel is not None:
                on_kernel(done, len(built), name)
            kernels[name], written = _write_kernel(folder, name, tactic, archs)
            files += written
    if on_kernel is not None:
        on_kernel(len(built), len(built), "")
    data = {
        "format": FORMAT,
        "version": VERSION,
        "hqc": __version__,
        "triton": version("triton"),
        "variants": names,
        "kernels": kernels,
    }
    path = folder / PLUGINS_FILE
    path.write_text(json.dumps(data, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [path, *files, *_copy_package(folder)]


def variants_of(nodes: Sequence[PluginNode]) -> Mapping[str, tuple[Variant, tuple[int, ...]]]:
    """key -> variant, and the places (pixels or rows a sample) of every node that has it.

    Raises:
        ExportError: naming a node that no kernel takes.
    """
    found: dict[str, tuple[Variant, tuple[int, ...]]] = {}
    for node in nodes:
        places = _places(node)
        for choice in node.choices():
            _, before = found.get(choice.variant.key, (None, ()))
            found[choice.variant.key] = choice.variant, (*before, places)
    return found


def _places(node: PluginNode) -> int:
    """Pixels or rows of a sample; sizes that are not known count as one."""
    sizes = node.dims[0]
    image = len(sizes) == 4 and node.attributes.get("channel_axis", 1) == 1
    return prod(size or 1 for size in (sizes[2:] if image else sizes[1:-1]))


def _name(tactic: Tactic) -> str:
    """Short, and another for every difference."""
    text = json.dumps([tactic.kernel, tactic.dtype, tactic.plain_options()], sort_keys=True)
    return f"{tactic.options.function}_{tactic.dtype}_{hashlib.sha256(text.encode()).hexdigest()[:10]}"


# ---- one kernel ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Build:
    """A kernel for one architecture: compiled, and the file that it lies in."""

    compiled: CompiledKernel
    file: str
    entry: str

    @property
    def ptx(self) -> str:
        """Under a name of its own: every kernel of an engine has another, and a profiler shows which ran."""
        ptx, count = re.subn(rf"(\.entry\s+){self.compiled.name}\b", rf"\1{self.entry}", self.compiled.ptx)
        assert count == 1, "PTX has one entry point"
        return ptx

    def facts(self) -> dict[str, Any]:
        """As plugins.json holds it."""
        compiled = self.compiled
        return {
            "file": self.file,
            "sha256": hashlib.sha256(self.ptx.encode()).hexdigest(),
            "entry": self.entry,
            "target": _target(compiled.ptx),
            "ptx_isa": compiled.ptx_version,
            "shared_bytes": compiled.shared_bytes,
            "num_stages": compiled.options.num_stages,
            "registers": compiled.registers,
            "spills": compiled.spills,
            "instruction": compiled.instruction,
        }


def _write_kernel(folder: Path, name: str, tactic: Tactic, archs: Sequence[str]) -> tuple[dict[str, Any], list[Path]]:
    """What plugins.json says of a kernel, and its files."""
    builds = {arch: _build(name, tactic, arch) for arch in archs}
    files = []
    for build in {build.file: build for build in builds.values()}.values():
        path = folder / build.file
        path.write_bytes(build.ptx.encode())
        files.append(path)
    first = next(iter(builds.values())).compiled
    kernel = {
        "kernel": tactic.kernel,
        "dtype": tactic.dtype,
        "options": tactic.plain_options(),
        "tile": list(tactic.tile),
        "num_warps": first.num_warps,
        "parameters": len(first.params),
        "archs": {arch: build.facts() for arch, build in builds.items()},
    }
    return kernel, files


def _build(name: str, tactic: Tactic, arch: str) -> _Build:
    compiled = _fitting(tactic, arch)
    if compiled.tensor_memory:
        # Tensor memory has to be had from the GPU by every program, and nobody says that TensorRT leaves it free. PTX
        # for sm_80 runs there too, on mma.sync.
        compiled = _fitting(tactic, "sm_80")
    return _Build(compiled, f"{name}_{compiled.arch.replace('_', '')}.ptx", name)


@lru_cache(maxsize=8)
def _fitting(tactic: Tactic, arch: str) -> CompiledKernel:
    """With as many stages as shared memory takes.

    Raises:
        ExportError: if it does not take one.
    """
    stages = range(tactic.options.num_stages, 0, -1)
    for count in stages:
        options = replace(tactic.options, num_stages=count)
        compiled = compile_kernel(tactic.kernel, tactic.dtype, _plain(options), arch)
        if compiled.shared_bytes <= MAX_SHARED_BYTES:
            return compiled
    raise ExportError(
        f"kernel {tactic.kernel} for {arch}",
        f"takes {compiled.shared_bytes} bytes of shared memory, a plugin has {MAX_SHARED_BYTES}",
        "Export with --plugins none, or a smaller Hadamard block.",
    )


def _plain(options: Any) -> dict[str, Any]:
    return {name: getattr(options, name) for name in options.__dataclass_fields__}


def _target(ptx: str) -> str:
    found = re.search(r"^\.target (\w+)", ptx, re.MULTILINE)
    assert found is not None, "PTX names its target"
    return found[1]


def _copy_package(folder: Path) -> list[Path]:
    """The Python that stands on its own."""
    place = folder / STANDALONE.name
    place.mkdir(exist_ok=True)
    copies = []
    for source in sorted(STANDALONE.glob("*.py")):
        copy = place / source.name
        copy.write_bytes(source.read_bytes())
        copies.append(copy)
    return copies
