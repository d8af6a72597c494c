"""Combinations of versions that are known not to work together, as data: a name, a test, what happens, what to do."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from hqc.engines.architectures import RTX, arch_name
from hqc.engines.builders import release
from hqc.engines.environment import Environment

__all__ = ["KNOWN_BAD", "KnownBad", "found_bad"]


@dataclass(frozen=True)
class KnownBad:
    """One combination.

    applies: whether an environment has it.
    effect: what goes wrong; do: what helps.
    """

    name: str
    applies: Callable[[Environment], bool]
    effect: str
    do: str


def found_bad(environment: Environment, known: Iterable[KnownBad] | None = None) -> tuple[KnownBad, ...]:
    """Those that an environment has."""
    return tuple(bad for bad in (KNOWN_BAD if known is None else known) if bad.applies(environment))


def _version(environment: Environment, name: str, low: str = "0", below: str = "1000000") -> bool:
    """Whether a package is installed in a version low ≤ v < below."""
    found = environment.versions.get(name)
    return found is not None and release(low) <= release(found) < release(below)


def _archs(environment: Environment) -> set[tuple[int, int]]:
    return {gpu.compute_capability for gpu in environment.driver.gpus} if environment.driver else set()


def _cuda(environment: Environment, below: tuple[int, int]) -> bool:
    """Whether the driver serves CUDA older than `below` only."""
    return environment.driver is not None and environment.driver.cuda < below


def _torch_newer_than_driver(environment: Environment) -> bool:
    if environment.driver is None or not environment.torch_cuda:
        return False
    return release(environment.torch_cuda)[:1] > environment.driver.cuda[:1]


KNOWN_BAD: tuple[KnownBad, ...] = (
    KnownBad(
        "triton 3.6 with numpy 2.4 or newer",
        lambda e: _version(e, "triton", "3.6", "3.7") and _version(e, "numpy", "2.4"),
        "triton's interpreter raises InterpreterError at a loop whose bounds are known at run time only, so kernels "
        "cannot be tested on a CPU",
        "pip install 'numpy<2.4', or triton 3.7",
    ),
    KnownBad(
        "tensorrt 10 with numpy 2.4 or newer",
        lambda e: _version(e, "tensorrt", "10", "11") and _version(e, "numpy", "2.4"),
        "a plugin with an int or float attribute fails (only 0-dimensional arrays can be converted to Python scalars); "
        "hqc's own pass arrays of one element, so that this is about other plugins in the same process",
        "pip install 'numpy<2.4', or tensorrt 11",
    ),
    KnownBad(
        "tensorrt-rtx with a GPU that it does not build for",
        lambda e: e.has("tensorrt_rtx") and any(arch_name(cc) not in RTX for cc in _archs(e)),
        f"TensorRT-RTX builds for {', '.join(RTX)} only; Hopper (sm_90) and data-centre Blackwell (sm_100) are refused",
        "build with --engine trt on that machine, or use the runtimes torch or onnxruntime",
    ),
    KnownBad(
        "tensorrt-rtx with sm_75",
        lambda e: e.has("tensorrt_rtx") and (7, 5) in _archs(e),
        "quantised convolutions run in float there, and products of float32 matrices, such as rotations of tokens, are "
        "refused (FP32 GEMM is not supported)",
        "use the runtimes torch or onnxruntime on that card",
    ),
    KnownBad(
        "triton 3.9 with a driver older than CUDA 13.4",
        lambda e: _version(e, "triton", "3.9") and _cuda(e, (13, 4)) and any(cc >= (9, 0) for cc in _archs(e)),
        "triton writes PTX ISA 9.4 for sm_90 and later, which that driver does not load "
        "(CUDA_ERROR_UNSUPPORTED_PTX_VERSION); hqc caps the version of its own kernels, other kernels fail",
        "update the driver, or take triton 3.6",
    ),
    KnownBad(
        "triton 3.7 on Blackwell with a driver older than CUDA 13.1",
        lambda e: _version(e, "triton", "3.7", "3.8") and _cuda(e, (13, 1)) and any(cc >= (10, 0) for cc in _archs(e)),
        "triton's assembler for sm_100 and later is that of CUDA 13.1, and PTX ISA 9.1 is not loaded by that driver "
        "(CUDA_ERROR_UNSUPPORTED_PTX_VERSION); hqc caps the version of its own kernels, other kernels fail",
        "update the driver, or take triton 3.6",
    ),
    KnownBad(
        "onnxruntime-gpu's TensorRT provider with tensorrt 11",
        lambda e: e.has("onnxruntime-gpu") and _version(e, "tensorrt", "11"),
        "the provider loads libnvinfer.so.10 and finds version 11",
        "pip install 'tensorrt<11' beside it, or build the engine with hqc build-engine",
    ),
    KnownBad(
        "onnxruntime 1.27 to 1.32 with int8 Q/DQ followed by a Transpose or Reshape at opset 21 or later",
        lambda e: _version(e, "onnxruntime", "1.27", "1.33"),
        "the session is refused unless the zero point is left out and output_dtype is given; hqc's exports for "
        "onnxruntime are written so, other models may fail",
        "quantise to uint8, or keep opset 20 in models that other tools write",
    ),
    KnownBad(
        "tensorrt older than 10.8",
        lambda e: _version(e, "tensorrt", "0", "10.8"),
        "hqc's exports need opset 21 and strongly typed networks",
        "pip install 'tensorrt>=10.8'",
    ),
    KnownBad(
        "torch built for a newer CUDA than the driver's",
        _torch_newer_than_driver,
        "torch finds no GPU",
        "update the driver, or install torch for the driver's CUDA",
    ),
)
