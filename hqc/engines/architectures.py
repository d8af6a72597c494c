"""GPU architectures by name, and which of them TensorRT-RTX builds for.

`sm_86` is compute capability 8.6. TensorRT-RTX 1.7 compiles for the architectures in `RTX` on any machine, with or
without a GPU; TensorRT times kernels on the card itself, so it builds for the card that it runs on and no other.
"""

import re
from collections.abc import Iterable, Mapping, Sequence

from hqc.errors import ExportError

__all__ = ["DEFAULT", "KNOWN", "RTX", "Capability", "arch_name", "capability", "check_rtx", "parse_archs"]

Capability = tuple[int, int]

KNOWN: Mapping[str, str] = {
    "sm_75": "Turing: T4, RTX 20",
    "sm_80": "Ampere: A100, A30",
    "sm_86": "Ampere: A10, A40, RTX 30",
    "sm_87": "Ampere: Jetson Orin",
    "sm_89": "Ada: L4, L40, RTX 40",
    "sm_90": "Hopper: H100, H200",
    "sm_100": "Blackwell: B100, B200",
    "sm_103": "Blackwell: B300",
    "sm_110": "Blackwell: Jetson Thor",
    "sm_120": "Blackwell: RTX 50, RTX PRO",
    "sm_121": "Blackwell: GB10",
}

RTX = ("sm_75", "sm_80", "sm_86", "sm_89", "sm_120", "sm_121")
"""`ComputeCapability` of tensorrt_rtx 1.7; its `set_compute_capability` refuses every other."""

DEFAULT = ("sm_80", "sm_86", "sm_89", "sm_120")
"""What is built where no GPU says otherwise: those of `RTX` whose convolutions run in INT8, one a generation."""


def parse_archs(text: str, option: str = "--arch") -> tuple[str, ...]:
    """Comma-separated names, in the order given, each once.

    Raises:
        ExportError: if there is none, or one is unknown.

    >>> parse_archs("sm_80, SM_86,sm_80")
    ('sm_80', 'sm_86')
    """
    names = tuple(dict.fromkeys(part.strip().lower() for part in text.split(",") if part.strip()))
    if not names:
        raise ExportError(option, "names no architecture", f"Give some of {', '.join(KNOWN)}.")
    check_known(names)
    return names


def check_known(names: Iterable[str]) -> None:
    """Refuses what is no architecture.

    Raises:
        ExportError: naming every unknown one.
    """
    if unknown := [name for name in names if name not in KNOWN]:
        raise ExportError(
            f"architecture {', '.join(unknown)}", "is not known", f"Give some of {', '.join(KNOWN)}, as in sm_80,sm_86."
        )


def check_rtx(names: Sequence[str]) -> None:
    """Refuses what TensorRT-RTX does not build for, before any work.

    Raises:
        ExportError: naming every such architecture.
    """
    check_known(names)
    if refused := [name for name in names if name not in RTX]:
        cards = "; ".join(f"{name} ({KNOWN[name]})" for name in refused)
        raise ExportError(
            f"architecture {cards}",
            f"TensorRT-RTX builds for {', '.join(RTX)} only",
            "Build with --engine trt on a machine with that card, or leave the architecture out.",
        )


def capability(arch: str) -> Capability:
    """Compute capability of an architecture.

    >>> capability("sm_86"), capability("sm_120")
    ((8, 6), (12, 0))
    """
    found = re.fullmatch(r"sm_(\d+)(\d)", arch)
    assert found is not None, arch
    return int(found[1]), int(found[2])


def arch_name(compute_capability: Capability) -> str:
    """The other way.

    >>> arch_name((9, 0))
    'sm_90'
    """
    major, minor = compute_capability
    return f"sm_{major}{minor}"
