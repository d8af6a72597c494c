"""What happens to a program before it is lowered: the passes of the target, and constants computed by torch."""

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, fx

from hqc.errors import ExportError
from hqc.export.reference import evaluate
from hqc.export.tensorrt.float_activations import FloatActivations, refuse_wide_codes
from hqc.group_checks import refuse_groups
from hqc.passes import FreezeIntegers, MergeLora, PackInt4, RotateWeights, SplitDigits
from hqc.passes.float_attention import with_float_attention
from hqc.passes.rewriting import rewrite
from hqc.pipeline import Pass, run_pipeline
from hqc.program import Program, Stage, aten, is_op

__all__ = ["Target", "fold_constants", "fold_tables", "prepare"]

Target = Literal["portable", "onnxruntime", "tensorrt"]

ops = torch.ops.hqc


def prepare(program: Program, target: Target, *, weight_only: Sequence[str] = ()) -> Program:
    """Runs the passes that the target needs and that the program has not had.

    weight_only: for `tensorrt`, wildcards over the sites whose activations stay float.

    Raises:
        ExportError: for an unknown target, or a program whose form the target cannot express.
    """
    if target not in get_args(Target):
        raise ExportError(f"target {target!r}", f"unknown; there are {', '.join(get_args(Target))}", "Use one of them.")
    if target != "portable":
        refuse_groups(program, f"target {target}")
    if target == "tensorrt":
        program = with_float_attention(program)
        refuse_wide_codes(program)
    prepared = run_pipeline(program, _missing_passes(program, target, weight_only))
    return fold_constants(fold_tables(prepared) if target == "tensorrt" else prepared)


def _missing_passes(program: Program, target: Target, weight_only: Sequence[str]) -> list[Pass]:
    if program.stage == Stage.CAPTURED:
        return []
    targets = {node.target for node in program.graph.nodes if node.op == "call_function"}
    passes: list[Pass] = []
    if program.stage != Stage.INTEGER:
        passes += [MergeLora(), FreezeIntegers()]
    integer = bool(targets & {ops.int_linear.default, ops.int_conv2d.default})
    if target == "portable" and integer:
        raise ExportError(
            "target portable", "the program's weights are rotated already", "Export it before rotate_weights."
        )
    packed = ops.unpack_int4.default in targets
    if weight_only:
        passes.append(FloatActivations(tuple(weight_only)))
    if target != "portable" and not integer:
        if packed:
            raise ExportError(
                f"target {target}", "the program is packed but not rotated", "Export it before pack_int4."
            )
        passes.append(RotateWeights())
    if target == "tensorrt":
        return passes
    if target == "onnxruntime" and ops.digit.default not in targets and not packed:
        passes.append(SplitDigits())
    if not packed:
        passes.append(PackInt4())
    return passes


@torch.no_grad()
def fold_tables(program: Program) -> Program:
    """Weights of tables of real numbers as the floats that they are: TensorRT has no product that looks them up."""
    edit = rewrite(program)
    for node in list(edit.graph.nodes):
        if is_op(node, ops.lookup.default):
            site = str(node.meta["site"])
            value = evaluate(program.evolve(graph=edit.graph), node, {})
            node.replace_all_uses_with(edit.weight(f"{site}.weight", value, node))
    return edit.finish()


@torch.no_grad()
def fold_constants(program: Program) -> Program:
    """Computes with torch what depends on no input and no weight: the frequencies of the timestep embedding.

    A runtime's own exp differs in the last bit, which sin(1000·x) would magnify.
    """
    edit = rewrite(program)
    known: dict[fx.Node, Tensor] = {}
    for node in list(edit.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if all(i in known for i in node.all_input_nodes) and not node.target._schema.name.startswith("hqc::"):
            value = node.target(*fx.map_arg(node.args, known.__getitem__), **fx.map_arg(node.kwargs, known.__getitem__))
            if isinstance(value, Tensor) and not is_op(node, aten.empty.memory_format):
                known[node] = value
    for node in known:
        readers = [u for u in node.users if u not in known]
        if readers:
            stored = edit.weight(f"constants.{node.name}", known[node].contiguous(), node)
            node.replace_all_uses_with(stored)
    return edit.finish()
