"""Outputs of single layers: what a layer gives in the student against what it gives in the float graph."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from hqc.errors import PlanError
from hqc.program import BATCH, Program
from hqc.site_names import names_site
from hqc.sites import output_of
from hqc.training.losses.seen import Seen
from hqc.training.losses.term import Term, weighed_squares

__all__ = ["LocalOutput"]

_OUTPUT_OF = "output of "


@dataclass(frozen=True)
class LocalOutput(Term):
    """weight·Σ_l Σ_n w_n·‖Ô_l(x̂_n) - O_l(x_n)‖² over the layers l that one of the patterns of `sites` names.

    Ô_l reads what the student computes in front of it, O_l what the float graph does; both halves of guidance are
    samples. A layer with a branch gives the sum. Source: QuEST (arXiv 2402.03666).
    """

    sites: tuple[str, ...]
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    by_layer: ClassVar[bool] = True

    def taps(self, program: Program) -> Mapping[str, str]:
        """The nodes that give the layers' outputs.

        Raises:
            PlanError: if no layer is named so, or one gives something whose first axis is not the batch.
        """
        named = [(site, layer) for site, layer in program.sites() if any(names_site(p, site) for p in self.sites)]
        where = f"local_output of {', '.join(self.sites)}"
        if not named:
            near = ", ".join(site for site, _ in list(program.sites())[:3])
            raise PlanError(where, "names no layer", f"Layers are called like {near}.")
        for site, layer in named:
            if (shape := layer.meta.get("shape", ()))[:1] != (BATCH,):
                raise PlanError(where, f"{site} gives {list(shape)}; expected the batch first", "Name other layers.")
        return {f"{_OUTPUT_OF}{site}": output_of(layer).name for site, layer in named}

    def __call__(self, student: Seen, teacher: Seen) -> Tensor:
        """The loss, a scalar."""
        own = [name for name in student.taps if self._has(name)]
        pairs = ((student.taps[name], teacher.taps[name].detach()) for name in own)
        first, *more = (weighed_squares(found, wanted, teacher.weight) for found, wanted in pairs)
        for one in more:
            first = first + one
        return first * self.weight

    def _has(self, name: str) -> bool:
        """Whether a tap is one of its own: other losses have theirs."""
        site = name.removeprefix(_OUTPUT_OF)
        return site != name and any(names_site(pattern, site) for pattern in self.sites)
