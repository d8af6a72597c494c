"""Attention in float again: what is written out becomes one operator, without its quantisers.

    before   y = Q_p(softmax(Q(q·f) @ Q(k)ᵀ + mask)) @ Q(v)
    after    y = scaled_dot_product_attention(q, k, v, mask, scale=f)

For targets that have no kernel for products of two quantised activations, or for the codes of a softmax: they compute
attention in their float type, which is nearer to the float model than the program is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from hqc.attentions import ATTENTION, WrittenOut, written_out
from hqc.passes.rewriting import Rewriter, rewrite
from hqc.pipeline import Findings, run_pass
from hqc.program import Program, Stage

__all__ = ["FLOAT_ATTENTION", "FloatAttention", "close_attention", "with_float_attention"]

FLOAT_ATTENTION = "attention runs in float: this target has no kernel for a quantised softmax or its products"


@dataclass(frozen=True)
class FloatAttention:
    """Makes one float operator of every attention that is written out, and takes it out of the plan."""

    takes: ClassVar[tuple[Stage, ...]] = tuple(Stage)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "nothing"

    def find(self, program: Program) -> Findings:
        """Every attention that is written out."""
        return Findings(tuple(found.name for found in written_out(program)))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Closes them."""
        edit = rewrite(program)
        for found in list(written_out(program.evolve(graph=edit.graph))):
            if found.name in matches:
                close_attention(edit, found)
        return edit.finish(plan=replace(program.plan, attentions=()))


def with_float_attention(program: Program) -> Program:
    """The program with one float operator for each attention; itself if none is written out."""
    return run_pass(program, FloatAttention()) if any(written_out(program)) else program


def close_attention(edit: Rewriter, found: WrittenOut) -> None:
    """Puts one operator in the place of an attention that is written out, under the same name."""
    result = found.result
    scope = {"scope": result.meta["scope"]} if "scope" in result.meta else {}
    operands = (found.query, found.key, found.value, *(() if found.mask is None else (found.mask,)))
    whole = edit.call(result, ATTENTION, *operands, like=result, **scope)
    whole.kwargs = {"scale": found.factor}
    result.replace_all_uses_with(whole)
    kept = result.name
    edit.graph.erase_node(result)
    whole.name = kept
