"""Kernels compiled ahead of time, without a GPU: PTX for a plugin or an engine, a cubin, and what ptxas says of them.

The entry point's parameters are in the order that TensorRT's ahead-of-time plugins pass: input pointers, 32-bit
integers, output pointers, and last the two scratch pointers that triton adds, which are null.  Nothing is specialised
on values except what `Parameter.multiple_of_16` says, and that pointers are multiples of 16 bytes.
"""

import importlib
import re
import subprocess
import tempfile
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from hqc.errors import ExportError, KernelError
from hqc.kernels.guards import require_triton
from hqc.kernels.options import FLOATS, KERNELS, MODULES, KernelOptions, Parameter

__all__ = ["ARCHITECTURES", "PTX_VERSIONS", "CompiledKernel", "cache_kernel", "compile_kernel", "kernel_options"]

PTX_VERSIONS: Mapping[str, int] = {"sm_80": 80, "sm_86": 80, "sm_89": 80, "sm_90": 80, "sm_100": 86, "sm_120": 87}
"""The lowest PTX ISA that each architecture's code generator takes, so that the oldest driver loads it.

Left alone, triton 3.9 writes ISA 9.4 for sm_90 and later, which a driver of CUDA 13.0 (ISA 9.0) refuses.  LLVM ends the
process for a lower one than these, so they are not to be searched for at run time.
"""
ARCHITECTURES: Sequence[str] = tuple(PTX_VERSIONS)
SCRATCH = (Parameter("global_scratch", "scratch", "*i8"), Parameter("profile_scratch", "scratch", "*i8"))
_INT8_PRODUCTS = (
    ("tcgen05", r"tcgen05\.mma[\w.:]*kind::i8"),
    ("wgmma", r"wgmma\.mma_async[\w.]*\.s32\.s8\.s8"),
    ("mma.sync", r"mma\.sync[\w.]*\.s32\.s8\.s8\.s32"),
)


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel for one architecture.

    name: the entry point.  params: its parameters in order, the two null scratch pointers last.
    shared_bytes: dynamic shared memory of a launch; a block has 32·num_warps threads.
    tensor_memory: columns of sm_100's tensor memory that a block allocates for itself.
    registers, spills: a thread's registers, and bytes of spill stores and loads, as ptxas reports them.
    """

    kernel: str
    arch: str
    dtype: str
    options: KernelOptions
    name: str
    ptx: str
    cubin: bytes
    params: tuple[Parameter, ...]
    num_warps: int
    shared_bytes: int
    tensor_memory: int
    registers: int
    spills: int

    @property
    def ptx_version(self) -> str:
        """The PTX ISA, such as "8.0"."""
        return _first(r"^\.version (\d+\.\d+)", self.ptx)

    @property
    def instruction(self) -> str:
        """The newest int8 matrix instruction in the PTX: "tcgen05", "wgmma", "mma.sync", or "" for none."""
        return next((name for name, pattern in _INT8_PRODUCTS if re.search(pattern, self.ptx)), "")


def kernel_options(kernel: str, options: Mapping[str, Any]) -> KernelOptions:
    """The options of a kernel from plain values, as JSON holds them (lists for pairs).

    Raises:
        KernelError: for an unknown kernel or option, or a value that the kernel does not take.
    """
    if kernel not in KERNELS:
        raise KernelError("compile_kernel", f"there is no kernel {kernel!r}", f"Choose one of {', '.join(KERNELS)}.")
    kind = KERNELS[kernel]
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(options) - known):
        found = f"{kernel} has no option {', '.join(unknown)}"
        raise KernelError("compile_kernel", found, f"Choose from {', '.join(sorted(known))}.")
    try:
        plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
        return kind(**plain)
    except ValueError as error:
        raise KernelError("compile_kernel", f"{kernel}: {error}", "Choose other options.") from error


def compile_kernel(kernel: str, dtype: str, options: Mapping[str, Any], arch: str) -> CompiledKernel:
    """Compiles one kernel ("hadamard_quantize", "int_gemm", …) for one architecture ("sm_80" … "sm_120").

    dtype: of x for `hadamard_quantize`, of the output for the products: "fp16", "bf16" or "fp32".
    options: fields of the kernel's class in `hqc.kernels.options`; what is left out has its default there.

    Raises:
        KernelError: for an unknown kernel, option, dtype or architecture, or inside triton's interpreter.
        ExportError: if triton cannot compile it, or the result needs what a plugin cannot give (scratch memory).
        RuntimeMissingError: if triton is missing.
    """
    where, chosen = _checked(kernel, dtype, options, arch)
    compiled = _compile(where, chosen, dtype, arch)
    meta = compiled.metadata
    scratch = meta.global_scratch_size + meta.profile_scratch_size
    if scratch or getattr(meta, "num_ctas", 1) != 1:
        raise ExportError(where, f"the kernel needs {scratch} bytes of scratch memory", "Use other tile sizes.")
    ptx = compiled.asm["ptx"]
    params = (*chosen.parameters(dtype), *SCRATCH)
    _check_entry(where, ptx, params)
    registers, spills = _resources(where, ptx, arch)
    return CompiledKernel(
        kernel=kernel,
        arch=arch,
        dtype=dtype,
        options=chosen,
        name=meta.name,
        ptx=ptx,
        cubin=compiled.asm["cubin"],
        params=params,
        num_warps=meta.num_warps,
        shared_bytes=meta.shared,
        tensor_memory=getattr(meta, "tmem_size", 0) or 0,
        registers=registers,
        spills=spills,
    )


def cache_kernel(kernel: str, dtype: str, options: Mapping[str, Any], arch: str) -> None:
    """Compiles a kernel into triton's cache on disk, where `compile_kernel` of any process finds it.

    Raises:
        KernelError, ExportError, RuntimeMissingError: as `compile_kernel` does.
    """
    where, chosen = _checked(kernel, dtype, options, arch)
    _compile(where, chosen, dtype, arch)


def _checked(kernel: str, dtype: str, options: Mapping[str, Any], arch: str) -> tuple[str, KernelOptions]:
    """What messages call it, and its options."""
    where = f"compile_kernel {kernel} for {arch}"
    chosen = kernel_options(kernel, options)
    if arch not in PTX_VERSIONS:
        raise KernelError(where, "that architecture is not one of ours", f"Choose one of {', '.join(ARCHITECTURES)}.")
    if dtype not in FLOATS:
        raise KernelError(where, f"the dtype is {dtype!r}", f"Choose one of {', '.join(FLOATS)}.")
    return where, chosen


def _compile(where: str, options: KernelOptions, dtype: str, arch: str) -> Any:
    require_triton(where)
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if knobs.runtime.interpret:
        raise KernelError(where, "this process interprets kernels (TRITON_INTERPRET is set)", "Compile in another one.")
    function = _function(options)
    given = {(p.name if p.role == "int32" else f"{p.name}_ptr"): p for p in options.parameters(dtype)}
    source = ASTSource(
        fn=function,
        signature={name: given[name].type if name in given else "constexpr" for name in function.arg_names},
        constexprs=options.constants(),
        attrs={
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(function.arg_names)
            if name in given and (given[name].role != "int32" or given[name].multiple_of_16)
        },
    )
    settings = {
        "ptx_version": PTX_VERSIONS[arch],
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
        "enable_fp_fusion": False,  # as the launchers: one rounding an operation
    }
    with knobs.compilation.scope():
        knobs.compilation.disable_line_info = True  # no source paths in PTX that is shipped
        try:
            return triton.compile(source, target=GPUTarget("cuda", _capability(arch), 32), options=settings)
        except Exception as error:  # triton raises RuntimeError, its own classes, and what its passes raise
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ExportError(where, f"triton could not compile it: {reason[0]}", "Use other tile sizes.") from error


def _function(options: KernelOptions) -> Any:
    return getattr(importlib.import_module(f"hqc.kernels.jit.{MODULES[options.function]}"), options.function)


def _capability(arch: str) -> int:
    return int(arch.removeprefix("sm_"))


def _check_entry(where: str, ptx: str, params: Sequence[Parameter]) -> None:
    """The PTX entry must take 64-bit pointers and 32-bit integers in the order that is promised."""
    found = re.findall(r"^\s*\.param \.(\w+)", ptx, re.MULTILINE)
    wanted = ["u32" if p.role == "int32" else "u64" for p in params]
    if found != wanted:
        raise ExportError(
            where, f"the entry point takes {found}, expected {wanted}", "Use the triton of constraints.txt."
        )


def _resources(where: str, ptx: str, arch: str) -> tuple[int, int]:
    """(registers a thread, bytes of spill stores and loads) from the assembler that triton brings."""
    from triton.backends.nvidia.compiler import get_ptxas

    target = f"{arch}a" if _capability(arch) >= 90 else arch
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        command = [
            get_ptxas(_capability(arch)).path,
            "-v",
            f"--gpu-name={target}",
            str(source),
            "-o",
            f"{folder}/cubin",
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ExportError(where, f"ptxas refused the PTX: {done.stderr.strip().splitlines()[-1]}", "Report it.")
    registers = int(_first(r"Used (\d+) registers", done.stderr))
    stores, loads = (int(_first(rf"(\d+) bytes spill {kind}", done.stderr)) for kind in ("stores", "loads"))
    return registers, stores + loads


def _first(pattern: str, text: str) -> str:
    match = re.search(pattern, text, re.MULTILINE)
    if match is None:
        raise ExportError("compile_kernel", f"nothing matches {pattern!r} in triton's output", "Report it.")
    return typing.cast(str, match[1])
