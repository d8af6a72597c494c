"""Pack INT4: codes in -8…7 are stored two a byte.

    before   w_q int8 [O, …]
    after    unpack_int4(packed uint8 [⌈n/2⌉], shape),  the first code in the low nibble

Unpacking gives back every code: nothing changes but the storage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from hqc.ops.weight_codes import fits_int4, pack_int4
from hqc.passes.rewriting import rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage

__all__ = ["PackInt4"]


@dataclass(frozen=True)
class PackInt4:
    """Halves the storage of every weight whose codes fit in four bits."""

    takes: ClassVar[tuple[Stage, ...]] = (Stage.INTEGER,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def find(self, program: Program) -> Findings:
        """Sites of at most 4 bits with codes in -8…7; asymmetric ones, q - z, may lie outside."""
        matches, misses = [], []
        for plan in program.plan.sites:
            if not plan.quantised and not plan.weight_only:
                misses.append((plan.site, f"float: {plan.reason}"))
            elif f"{plan.site}.weight_packed" in program.state:
                misses.append((plan.site, "is packed already"))
            elif (plan.weight_bits or 8) > 4:
                misses.append((plan.site, f"{plan.weight_bits} bits do not fit in 4"))
            elif not fits_int4(codes := program.state[f"{plan.site}.weight_codes"]):
                misses.append((plan.site, f"codes {int(codes.min())}…{int(codes.max())} do not fit in 4 bits"))
            else:
                matches.append(plan.site)
        return Findings(tuple(matches), tuple(misses))

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Replaces the stored tensor by packed bytes and an unpacking node."""
        edit = rewrite(program)
        readers = {str(n.target): n for n in edit.graph.nodes if n.op == "get_attr"}
        for site in matches:
            reader = readers[f"{site}.weight_codes"]
            codes = program.state[f"{site}.weight_codes"]
            packed = edit.weight(f"{site}.weight_packed", pack_int4(codes), reader)
            unpacked = edit.call(
                reader,
                torch.ops.hqc.unpack_int4.default,
                packed,
                list(codes.shape),
                like=reader,
                site=site,
                role="weight",
            )
            reader.replace_all_uses_with(unpacked)
        return edit.finish()
