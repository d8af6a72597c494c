"""The integer form that the kernels run: every quantised site an integer product of rotated codes."""

from collections.abc import Iterator

import torch
from torch import fx

from hqc.errors import ExportError, RuntimeMissingError
from hqc.group_checks import refuse_groups
from hqc.passes import FreezeIntegers, MergeLora, PackInt4, RotateWeights
from hqc.passes.float_attention import with_float_attention
from hqc.pipeline import Pass, run_pipeline
from hqc.program import Program, Stage, is_op
from hqc.rotations import Rotation
from hqc.sites import QuantisedSite, quantised_sites, rotation_of

__all__ = [
    "integer_form",
    "require_quantised",
    "site_input",
    "site_refusals",
    "site_rotation",
    "stored_form",
    "unchecked_form",
]

_CUDA = "torch-cuda"
ops = torch.ops.hqc
_PRODUCTS = (ops.int_linear.default, ops.int_conv2d.default)


def require_quantised(stage: str, runtime: str = _CUDA) -> None:
    """Refuses a float program.

    runtime: whose name the refusal gives, here and below.

    Raises:
        RuntimeMissingError: naming its stage.
    """
    if stage == Stage.CAPTURED:
        raise RuntimeMissingError(
            f"runtime {runtime}",
            "runs integer products and the program is not quantised",
            "Quantise it with `hqc ptq` or `hqc qat`.",
        )


def integer_form(program: Program, runtime: str = _CUDA) -> Program:
    """The program after the passes that it still needs, its sites checked against what the kernels take.

    Raises:
        RuntimeMissingError: for a float program. ExportError: for a site that the kernels cannot run.
    """
    integer = unchecked_form(program, runtime)
    if refused := next(site_refusals(integer), None):
        raise ExportError(f"runtime {runtime}", f"{refused.where} {refused.found}", refused.do)
    return integer


def unchecked_form(program: Program, runtime: str = _CUDA) -> Program:
    """`integer_form` before its sites are checked.

    Raises:
        RuntimeMissingError, ExportError: for what no check of a site can say.
    """
    name = f"runtime {runtime}"
    require_quantised(program.stage, runtime)
    refuse_groups(program, name)
    if attached := program.attached_styles:
        found = f"has no inputs for LoRAs, and {attached[0]} is attached"
        raise RuntimeMissingError(name, found, "Merge it at `hqc trace --lora`, or use runtime torch or an export.")
    return run_pipeline(with_float_attention(program), _missing_passes(program, name))


def stored_form(program: Program, runtime: str = _CUDA) -> Program:
    """`integer_form` with codes of at most four bits packed: a program as small on disk as a GPU holds it.

    Raises:
        RuntimeMissingError, ExportError: see `integer_form`.
    """
    return run_pipeline(integer_form(program, runtime), [PackInt4()])


def site_rotation(site: QuantisedSite) -> Rotation:
    """What a site's activation is rotated by, order 1 for nothing."""
    before = site.quantiser.args[0]
    return rotation_of(before) if is_op(before, ops.hadamard.default) else Rotation(1)  # type: ignore[arg-type]


def site_input(site: QuantisedSite) -> fx.Node:
    """What a site quantises, before the rotation, in the graph as it is now."""
    before = site.quantiser.args[0]
    return before.args[0] if is_op(before, ops.hadamard.default) else before  # type: ignore[return-value, union-attr]


def _missing_passes(program: Program, name: str) -> list[Pass]:
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    passes: list[Pass] = [] if program.stage == Stage.INTEGER else [MergeLora(), FreezeIntegers()]
    if targets & set(_PRODUCTS):
        return passes
    if ops.unpack_int4.default in targets:
        raise ExportError(name, "the program is packed but not rotated", "Take it before pack_int4.")
    return [*passes, RotateWeights()]


def site_refusals(integer: Program) -> Iterator[ExportError]:
    """What the kernels do not take: every activation's codes must end in a product of int8; none runs in float."""
    for node in integer.graph.nodes:
        if is_op(node, ops.lookup.default):
            yield ExportError(
                f"site {node.meta.get('site')}",
                "has a weight of a table of real numbers, which no integer product takes",
                "Use the torch runtime or an export, or the recipe ganq-int8, whose tables are whole.",
            )
        if is_op(node, ops.dequantize.default):
            yield ExportError(
                f"site {node.meta.get('site')}",
                "is no integer product (its sums may pass int32), which the kernels need",
                "Leave it float with keep_float.",
            )
    for site in quantised_sites(integer):
        low, high = site.bounds.low, site.bounds.high
        if not -128 <= low < high <= 127:
            yield ExportError(
                f"site {site.site}",
                f"has asymmetric activation codes {low}…{high}; the kernels take -128…127 where code 0 is real 0",
                "Quantise symmetrically.",
            )
