"""Insert quantisers into attention that is written out: its softmax, and where asked q, k and v.

    before   y = softmax((q·f) @ kᵀ + mask) @ v
    after    y = Q_p(softmax(Q(q·f) @ Q(k)ᵀ + mask); s_p[i], log2[i]) @ Q(v)

Q_p has 2ⁿ codes from 0, `hqc::softmax_quantize`: even steps of size s_p, or powers of two where log2 is 1, which
`choose_softmax` decides. Q is a layer's activation quantiser, at the asked bits. The row i is that of the nearest
timestep. Scales start at 1/(2ⁿ-1) for a softmax and 1 for the others: `calibrate_activations` fills them.
What has no quantiser becomes one operator again, which runtimes compute faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar, Literal

import torch
from torch import fx

from hqc.attention_plan import AttentionPlan
from hqc.attentions import WrittenOut, attentions, part_name, written_out
from hqc.bits import HIGHEST_ASYMMETRIC_BITS, activation_range, parse_bits
from hqc.errors import PlanError
from hqc.passes.float_attention import close_attention
from hqc.passes.insert_qdq import bounds_around, look_up_row
from hqc.passes.open_attention import NONE
from hqc.passes.rewriting import Rewriter, rewrite
from hqc.pipeline import Findings
from hqc.program import BATCH, Program, Stage, aten
from hqc.steps import Within, check_options

__all__ = ["ATTENTION_GRID", "InsertAttentionQdq"]

ATTENTION_GRID = "attention_grid"
ops = torch.ops.hqc


@dataclass(frozen=True)
class InsertAttentionQdq:
    """Puts quantisers into every attention that open_attention has written out.

    softmax_bits: of the softmax, 2 to 8; 0 leaves it float. operands: "float" leaves q, k and v as they are; else they
    have the asked activation bits, "asymmetric" up to 7 of them. static: one row of scales for all timesteps.
    """

    softmax_bits: Annotated[int, Within(ge=0, le=8)] = 8
    operands: Literal["float", "symmetric", "asymmetric"] = "float"
    static: bool = False

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "nothing"

    def __post_init__(self) -> None:
        check_options(self)
        if self.softmax_bits == 1:
            raise PlanError("insert_attention_qdq", "softmax_bits is 1", "Give 2 to 8, or 0 for a float softmax.")

    def find(self, program: Program) -> Findings:
        """Every attention that is written out; misses are those that stay float."""
        reasons = {found.name: self._unfit(found) for found in written_out(program)}
        reasons |= dict.fromkeys((name for name, _ in attentions(program.graph)), "float: it is not written out")
        misses = tuple((name, reason) for name, reason in reasons.items() if reason) if reasons else (NONE,)
        return Findings(tuple(name for name, reason in reasons.items() if not reason), misses)

    def _unfit(self, found: WrittenOut) -> str:
        if not self.softmax_bits and self.operands == "float":
            return "float: nothing of it is asked to be quantised"
        if any(node.meta["shape"][0] != BATCH for node in (found.query, found.key, found.value)):
            return "float: the first axis of its operands is not the batch"
        return "its softmax is quantised already" if found.quantisers else ""

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the lookup of the row once, then the quantisers; the others become one operator again."""
        edit, plans = rewrite(program), []
        grid = (program.plan.timesteps or (0.0,))[: 1 if self.static or not program.has_timestep else None]
        row = look_up_row(edit, grid, ATTENTION_GRID) if matches else None
        for found in list(written_out(program.evolve(graph=edit.graph))):
            if found.name not in matches:
                if not found.quantisers:
                    close_attention(edit, found)
                continue
            plans.append(self._planned(program, found.name))
            self._quantise(edit, found, plans[-1], row, len(grid))
        return edit.finish(plan=replace(program.plan, attentions=(*program.plan.attentions, *plans)))

    def _planned(self, program: Program, name: str) -> AttentionPlan:
        softmax = self.softmax_bits or None
        if self.operands == "float":
            return AttentionPlan(name, softmax)
        bits = parse_bits(program.plan.bits).activation if program.plan.bits else 8
        return AttentionPlan(name, softmax, bits, self.operands == "symmetric" or bits > HIGHEST_ASYMMETRIC_BITS)

    def _quantise(self, edit: Rewriter, found: WrittenOut, plan: AttentionPlan, row: fx.Node | None, rows: int) -> None:
        if plan.operand_bits is not None:
            for part, x in (("query", found.scaled), ("key", found.key), ("value", found.value)):
                _quantise_operand(edit, found, plan, part, x, row, rows)
        if plan.softmax_bits is not None:
            _quantise_softmax(edit, found, plan.softmax_bits, row, rows)


def _reader(found: WrittenOut, part: str) -> fx.Node:
    """The node that reads a part."""
    scores = found.scores
    readers = {"query": scores, "key": scores.args[1], "value": found.result, "softmax": found.result}
    return readers[part]  # type: ignore[return-value]


def _looked_up(edit: Rewriter, table: fx.Node, row: fx.Node | None, reader: fx.Node) -> fx.Node:
    return edit.call(reader, aten.index_select.default, table, 0, row, shape=(BATCH,), dtype="float32")


def _quantise_operand(
    edit: Rewriter, found: WrittenOut, plan: AttentionPlan, part: str, x: fx.Node, row: fx.Node | None, rows: int
) -> None:
    name, reader, bits = part_name(found.name, part), _reader(found, part), plan.operand_bits or 8
    scale = _looked_up(edit, edit.weight(f"{name}.activation_scale_table", torch.ones(rows), reader), row, reader)
    target, low, high = ops.fake_quantize.default, *activation_range(bits)
    if not plan.operands_symmetric:
        middle = torch.full((rows,), float(2 ** (bits - 1)))
        zero = edit.weight(f"{name}.activation_zero_table", middle, reader)
        target = ops.fake_quantize_bounded.default
        low, high = (_looked_up(edit, bound, row, reader) for bound in bounds_around(edit, zero, bits, reader))  # type: ignore[assignment]
    quantised = edit.call(reader, target, x, scale, low, high, like=x, **_meta(found, name, "operand_quantizer"))
    if part == "value":  # the product may read one tensor twice
        reader.args = (reader.args[0], quantised)
    else:
        reader.replace_input_with(x, quantised)


def _quantise_softmax(edit: Rewriter, found: WrittenOut, bits: int, row: fx.Node | None, rows: int) -> None:
    name, reader = part_name(found.name, "softmax"), found.result
    tables = {"activation_scale_table": 1 / (2**bits - 1), "log2_table": 0.0}
    stored = (edit.weight(f"{name}.{kind}", torch.full((rows,), value), reader) for kind, value in tables.items())
    scale, log2 = (_looked_up(edit, table, row, reader) for table in stored)
    p = found.softmax
    meta = _meta(found, name, "softmax_quantizer")
    quantised = edit.call(reader, ops.softmax_quantize.default, p, scale, log2, bits, like=p, **meta)
    reader.args = (quantised, reader.args[1])


def _meta(found: WrittenOut, name: str, role: str) -> dict[str, str]:
    scope = {"scope": found.result.meta["scope"]} if "scope" in found.result.meta else {}
    return {**scope, "site": name, "role": role}
