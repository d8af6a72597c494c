"""What a target makes of quantised attention, in a line for people."""

from hqc.attentions import softmax_kinds
from hqc.passes.float_attention import FLOAT_ATTENTION
from hqc.program import Program

__all__ = ["attention_note"]


def attention_note(program: Program, target: str) -> str:
    """How attention runs at a target, with the reason where it is float; empty where none is quantised."""
    count = len(program.plan.attentions)
    if not count:
        return ""
    if target not in ("portable", "onnxruntime"):
        return f"{count} float: {FLOAT_ATTENTION}"
    softmaxes = [node for node in program.graph.nodes if node.meta.get("role") == "softmax_quantizer"]
    powers = sum(softmax_kinds(program, node)[1] for node in softmaxes)
    note = f"{count} with float products of quantised values"
    return f"{note}; {powers} in powers of two, which no integer product takes" if powers else note
