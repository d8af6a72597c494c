"""Write attention out: two products and a softmax in the place of one operator, so that its parts can be quantised.

    before   y = scaled_dot_product_attention(q, k, v, mask, scale=f)         f = 1/√d where no scale is given
    after    y = softmax((q·f) @ kᵀ + mask) @ v

Exact but for rounding. The factor comes in front of the product: a sum that leaves half precision leaves it later.
`insert_attention_qdq` puts quantisers in, and makes one operator again of what it leaves float.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from hqc.attentions import argument_problem, attention_arguments, attentions, attentions_by_fit, written_out
from hqc.passes.rewriting import Rewriter, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage, aten

__all__ = ["NONE", "OpenAttention"]

NONE = ("attention", "the model has none")
"""What passes say of a model without attention."""


@dataclass(frozen=True)
class OpenAttention:
    """Writes every plain attention out, with or without a mask that is added."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Attentions by the module that holds their projections; the others are misses."""
        matches, misses = attentions_by_fit(program, _unfit)
        if not matches and not misses and not any(written_out(program)):
            misses.append(NONE)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Writes these out."""
        if not matches:
            return program
        edit = rewrite(program)
        for name, node in list(attentions(edit.graph)):
            if name in matches:
                _write_out(edit, name, node)
        return edit.finish()


def _unfit(node: fx.Node) -> str:
    """Why an attention is left as it is, or nothing."""
    if problem := argument_problem(node, masked=True):
        return problem
    shapes = [node.args[i].meta.get("shape", ()) for i in range(3)]  # type: ignore[union-attr]
    if not all(len(shape) == len(shapes[0]) >= 3 for shape in shapes):
        return f"its operands have {', '.join(str(len(shape)) for shape in shapes)} axes"
    return "" if isinstance(shapes[0][-1], int) else "the size of its heads is not known before it runs"


def _write_out(edit: Rewriter, name: str, node: fx.Node) -> None:
    given = attention_arguments(node)
    query, key, value, mask = given["query"], given["key"], given["value"], given.get("attn_mask")
    scale = given.get("scale")
    *rows, width = query.meta["shape"]
    factor = float(width) ** -0.5 if scale is None else float(scale)
    keys, dtype = key.meta["shape"][-2], query.meta.get("dtype", "float32")

    def call(target: Any, *args: Any, shape: Any, **meta: Any) -> fx.Node:
        scope = {"scope": node.meta["scope"]} if "scope" in node.meta else {}
        return edit.call(node, target, *args, shape=tuple(shape), dtype=dtype, **scope, **meta)

    scaled = query if factor == 1 else call(aten.mul.Scalar, query, factor, shape=query.meta["shape"])
    turned = call(aten.transpose.int, key, -2, -1, shape=(*key.meta["shape"][:-2], width, keys))
    scores = call(aten.matmul.default, scaled, turned, shape=(*rows, keys))
    if mask is not None:
        scores = call(aten.add.Tensor, scores, mask, shape=(*rows, keys))
    weights = call(aten.softmax.int, scores, -1, shape=(*rows, keys))
    result = call(aten.matmul.default, weights, value, shape=node.meta["shape"], site=name, role="attention")
    node.replace_all_uses_with(result)
    kept = node.name
    edit.graph.erase_node(node)
    result.name = kept
