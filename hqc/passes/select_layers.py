"""Select layers: ordered wildcard rules over site names decide bits, rotation and float exceptions.

The graph stays as it is; the decisions go into the plan. Rules of a plan file (`hqc.site_rules`) come after the
recipe's, and what is kept float after both. Layers that no rule can quantise are misses:

    grouped convolution          the rotation would mix channels of different groups
    first axis is not the batch  a per-sample scale has nothing to attach to
    weight is not a parameter    there is nothing to quantise ahead of time
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from hqc.bits import parse_bits
from hqc.errors import PassError, PlanError
from hqc.passes.rewriting import CONV, LINEAR
from hqc.pipeline import Findings
from hqc.plan import RULE_SETS, Rule, SitePlan, decide
from hqc.program import BATCH, Program, Stage, aten, is_op
from hqc.site_rules import changed, deciding

__all__ = ["SelectLayers"]

_UNSUPPORTED = {
    aten.conv1d.default: "conv1d is not rewritten",
    aten.conv1d.padding: "conv1d is not rewritten",
    aten.conv3d.default: "conv3d is not rewritten",
    aten.conv3d.padding: "conv3d is not rewritten",
    aten.conv2d.padding: "a convolution with padding given as text is not rewritten",
    aten.conv_transpose1d.default: "transposed convolutions are not rewritten",
    aten.conv_transpose2d.input: "transposed convolutions are not rewritten",
    aten.conv_transpose3d.input: "transposed convolutions are not rewritten",
    aten.addmm.default: "addmm is not rewritten; capture the module in training IR",
}


@dataclass(frozen=True)
class SelectLayers:
    """Decides for every conv and linear layer: bits, float, rotation allowed.

    bits: `wNaM`; empty: what the plan asks for, or w4a4. rules: the name of a rule set (`default`, `reference`,
    `mixed`, `all`). keep_float: wildcard patterns of sites to leave float, besides those of the plan; one that matches
    nothing is an error.
    """

    bits: str = ""
    rules: str = "default"
    keep_float: tuple[str, ...] = ()

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def _patterns(self, program: Program) -> tuple[str, ...]:
        return (*program.plan.keep_float, *self.keep_float)

    def _rule(self, program: Program, site: str) -> Rule | None:
        """What decides for a site."""
        if self.rules not in RULE_SETS:
            raise PlanError(f"rules {self.rules!r}", f"unknown; there are {', '.join(RULE_SETS)}", "Use one of them.")
        kept = [Rule(pattern, "asked for", float_=True) for pattern in self._patterns(program)]
        return decide(site, kept) or changed(decide(site, RULE_SETS[self.rules]), program.plan.rules, site)

    def find(self, program: Program) -> Findings:
        """Sites to quantise; misses are layers that stay float."""
        if rotated := [plan.site for plan in program.plan.sites if plan.block]:
            raise PassError("select_layers", f"{rotated[0]} is rotated already", "Run it before insert_hadamard.")
        matches, misses = [], []
        for site, node in program.sites():
            reason = _unfit(node) or self._float_reason(program, site)
            misses.append((site, reason)) if reason else matches.append(site)
        for node in program.graph.nodes:
            if node.op == "call_function" and node.target in _UNSUPPORTED:
                misses.append((node.name, _UNSUPPORTED[node.target]))
            elif is_op(node, CONV, LINEAR) and node.meta.get("role") != "layer":
                misses.append((node.name, "its weight is not a parameter"))
        self._check_patterns(program)
        return Findings(tuple(matches), tuple(misses))

    def _float_reason(self, program: Program, site: str) -> str:
        rule = self._rule(program, site)
        if rule is None:
            return "no rule names it"
        return f"rule {rule.pattern!r}: {rule.why}" if rule.float_ else ""

    def _check_patterns(self, program: Program) -> None:
        sites = [site for site, _ in program.sites()]
        patterns = [(pattern, f"pattern {pattern!r}", "") for pattern in self._patterns(program)]
        patterns += [(rule.pattern, rule.place, f"pattern {rule.pattern!r} ") for rule in program.plan.rules]
        for pattern, place, named in patterns:
            if any(decide(site, [Rule(pattern, "")]) for site in sites):
                continue
            for record in program.history:
                if gone := [site for site in record.removed if decide(site, [Rule(pattern, "")])]:
                    found = f"{named}matches no site that is left: {record.text.partition('(')[0]} removed {gone[0]}"
                    raise PlanError(place, found, "Nothing of it is quantised: leave the pattern out.")
            near = ", ".join(sites[:3])
            raise PlanError(place, f"{named}matches no site", f"Sites are named like {near}.")

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Writes the plan: one entry for every layer, quantised or float with the reason."""
        asked, misses = parse_bits(self.bits or program.plan.bits or "w4a4"), dict(self.find(program).misses)
        plans = []
        for site, node in program.sites():
            rule, plan = self._rule(program, site), _describe(site, node)
            if site not in matches or rule is None:
                plans.append(replace(plan, reason=misses.get(site, "not selected")))
                continue
            bits = rule.bits or asked
            reason = "" if rule.rotate else f"unrotated: {rule.why}"
            said = deciding(program.plan.rules, site, "trained")
            trained = bool(said.trained) if said is not None else rule.trained or bits == asked
            plan = replace(plan, weight_bits=bits.weight, activation_bits=bits.activation, reason=reason)
            plans.append(replace(plan, trained=trained))
        return program.evolve(plan=replace(program.plan, bits=str(asked), sites=tuple(plans)))


def _describe(site: str, node: fx.Node) -> SitePlan:
    outputs, inputs = node.args[1].meta["shape"][:2]  # type: ignore[union-attr]
    return SitePlan(site, "conv2d" if is_op(node, CONV) else "linear", inputs, outputs)


def _unfit(node: fx.Node) -> str:
    if is_op(node, CONV) and len(node.args) > 6 and node.args[6] != 1:
        return f"grouped convolution ({node.args[6]} groups): the rotation would mix groups"
    shape = node.args[0].meta.get("shape", ())  # type: ignore[union-attr]
    if not shape or shape[0] != BATCH:
        return f"the first axis of its input {list(shape)} is not the batch: a scale per sample cannot be applied"
    return ""
