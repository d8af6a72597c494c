"""Finetune only: the layers that a method names learn, as many of them as a share of the parameters allows.

    before   every layer of the asked bits may learn
    after    the named ones may, while  Σ (weights and scale tables that learn) ≤ share·Σ all

The graph and its numbers stay as they are; the choice goes into the plan (`trained`), which training keeps to. Layers
of 8 bits, as the time embedding's, may be named too. Where they are more than the share, the patterns take turns, each
with its smallest layer that is left: every kind of layer learns, and as many of them as can be. The others are misses
with their percentage. Source: QuEST (arXiv 2402.03666), which trains less than 7 % of the parameters; the order is the
project's own choice.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from torch import fx

from hqc.errors import PlanError
from hqc.passes.rewriting import UNPLANNED, layer_inputs
from hqc.pipeline import Findings
from hqc.program import Program, Stage
from hqc.site_names import names_site
from hqc.site_rules import deciding
from hqc.steps import Within, check_options

__all__ = ["FinetuneOnly"]


@dataclass(frozen=True)
class FinetuneOnly:
    """Lets the layers that one of the patterns names learn, and no others.

    sites: the patterns; one that names no quantised layer is a miss. share: of all parameters that may learn at most,
    a layer's weight and its table of activation scales counted.
    """

    sites: tuple[str, ...] = ("*",)
    share: Annotated[float, Within(gt=0, le=1)] = 0.07

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        check_options(self)

    def find(self, program: Program) -> Findings:
        """The layers that may learn.

        Raises:
            PlanError: if a model has quantised layers, and none is named or none fits into the share.
        """
        readers = Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr" for _ in n.users)
        reasons = {site: self._unfit(program, site, layer, readers) for site, layer in program.sites()}
        fitting = [site for site, why in reasons.items() if not why]
        layers, total = dict(program.sites()), _parameters(program)
        sizes = {site: _size(program, site, layers[site]) for site in fitting}
        chosen = self._chosen(sizes, self.share * total)
        if program.plan.quantised and not chosen:
            self._refuse(sizes, total)
        learn = sum(sizes[site] for site in chosen)
        for site in sizes.keys() - chosen:
            share = _percent((learn + sizes[site]) / total)
            reasons[site] = f"with it {share} of the parameters would learn; {self._most}"
        unmet = [p for p in self.sites if p not in reasons and not any(names_site(p, site) for site in fitting)]
        misses = [*reasons.items(), *((pattern, "names no layer that may learn") for pattern in unmet)]
        return Findings(
            tuple(site for site in fitting if site in chosen), tuple((site, why) for site, why in misses if why)
        )

    def _chosen(self, sizes: Mapping[str, int], room: float) -> set[str]:
        """The layers that fit: the patterns in turns, each with its smallest one that is left."""
        waiting = {pattern: list[str]() for pattern in self.sites}
        for site in sorted(sizes, key=sizes.__getitem__):
            waiting[next(pattern for pattern in self.sites if names_site(pattern, site))].append(site)
        chosen: set[str] = set()
        while any(waiting.values()):
            for pattern, left in waiting.items():
                if left and sizes[left[0]] <= room:
                    room -= sizes[left[0]]
                    chosen.add(left.pop(0))
                else:
                    waiting[pattern] = []  # those behind it are larger
        return chosen

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Writes it into the plan."""
        left = {site: why for site, why in self.find(program).misses if self._most in why}
        plans = {
            plan.site: replace(plan, trained=plan.site in matches, reason=_joined(plan.reason, left.get(plan.site, "")))
            for plan in program.plan.quantised
        }
        return program.evolve(plan=program.plan.with_sites(plans))

    @property
    def _most(self) -> str:
        return f"at most {_percent(self.share)} may"

    def _unfit(self, program: Program, site: str, layer: fx.Node, readers: Mapping[str, int]) -> str:
        """Why a layer does not learn, apart from its size."""
        if site not in program.plan:
            return UNPLANNED
        if not program.plan[site].quantised:
            return f"float: {program.plan[site].reason}"
        if not any(names_site(pattern, site) for pattern in self.sites):
            return "not among the layers to finetune"
        said = deciding(program.plan.rules, site, "trained")
        if said is not None and not said.trained:
            return f"{said.place} says that it is not trained"
        if program.plan[site].grouped:
            return "scales of groups are not trained"
        if program.plan[site].weight_lookup:
            return "its weight comes from a table: it would learn out of it"
        if program.plan[site].lora_rank:
            return "has a LoRA, which learns instead of its weight"
        return "several layers read its weight" if readers[_stored(layer)] > 1 else ""

    def _refuse(self, sizes: Mapping[str, int], total: int) -> None:
        where = f"finetune_only of {', '.join(self.sites)}"
        if not sizes:
            raise PlanError(where, "names no quantised layer that may learn", "Name layers that the model has.")
        least = min(sizes, key=sizes.__getitem__)
        found = f"the smallest, {least}, is {_percent(sizes[least] / total)} of the parameters; {self._most} learn"
        raise PlanError(where, found, "Give a larger share (--set finetune_only.share=0.2).")


def _stored(layer: fx.Node) -> str:
    """The name of the weight in front of its quantiser."""
    quantised: Any = layer_inputs(layer)[1]
    return str(quantised.args[0].target)


def _size(program: Program, site: str, layer: fx.Node) -> int:
    """How many values of a layer may learn."""
    return program.state[_stored(layer)].numel() + program.state[f"{site}.activation_scale_table"].numel()


def _parameters(program: Program) -> int:
    """How many values the program has."""
    return sum(tensor.numel() for tensor in program.state.values() if tensor.is_floating_point())


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def _joined(*texts: str) -> str:
    return "; ".join(text for text in texts if text)
