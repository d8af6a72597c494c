"""What a target makes of quantised attention, in a line for people."""

from collections import Counter

from hqc.export.attention_products import attention_products
from hqc.passes.float_attention import FLOAT_ATTENTION
from hqc.program import Program

__all__ = ["attention_note"]


def attention_note(program: Program, target: str) -> str:
    """How attention runs at a target, with the reason of every product that is float; empty where none is quantised."""
    count = len(program.plan.attentions)
    if not count:
        return ""
    if target not in ("portable", "onnxruntime"):
        return f"{count} float: {FLOAT_ATTENTION}"
    if target == "portable":
        return f"{count} with float products of quantised values"
    obstacles = Counter(product.obstacle for product in attention_products(program))
    total, integers = obstacles.total(), obstacles.pop("", 0)
    floats = "".join(f"; {number} of floats: {why}" for why, number in obstacles.items())
    return f"{count} with {integers} of {total} products of integers{floats}"
