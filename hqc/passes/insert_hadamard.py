"""Insert Hadamard nodes: every selected layer reads a rotated input, and nothing changes yet.

    before   y = op(x, W)
    after    y = op(Ĥ·(Ĥ·x), W)      single, HQ-DM's: the weight keeps its own grid
             y = op(Ĥ·x, W·Ĥ)        double, ConvRot's (`weights=True`): the weight is quantised rotated as well

Ĥ = H_b/√b on channels, block by block; it is symmetric and its own inverse, so nothing changes until `insert_qdq` puts
a quantiser behind the first rotation. H is Sylvester's matrix or the regular one (`hqc.rotations`). The block is the
largest order of the kind ≤ `block` that divides the input channels; without one the site stays unrotated and the plan
says so. Sites that read the same tensor share the first rotation where its kind and order are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from hqc.errors import PlanError
from hqc.passes.rewriting import UNPLANNED, Rewriter, channel_axis, layer_inputs, rewrite
from hqc.pipeline import Findings
from hqc.program import Program, Stage
from hqc.rotations import KINDS, ORDERS, Rotation, block_size
from hqc.site_rules import deciding

__all__ = ["InsertHadamard"]

HADAMARD = torch.ops.hqc.hadamard.default


@dataclass(frozen=True)
class InsertHadamard:
    """Rotates the input of every quantised site, and back or the weight too.

    block: order of the Hadamard matrix, of those that its kind has (`hqc.rotations.ORDERS`), or 0 to rotate only what
    `sites` and the plan's rules name. tokens: rotate
    three-dimensional inputs (attention and feed-forward linears) too; False reproduces the reference implementation,
    which leaves them unrotated. kind: "sylvester" or "regular". weights: W·Ĥ becomes the weight instead of a rotation
    back, so that codes are never rotated. sites: (site, kind, order) for single sites, instead of `kind` and `block`,
    and whatever `tokens` says; order 0 leaves the site unrotated, any other must be possible there.
    """

    block: int = 32
    tokens: bool = True
    kind: str = "sylvester"
    weights: bool = False
    sites: tuple[tuple[str, str, int], ...] = ()

    takes: ClassVar[tuple[Stage, ...]] = (Stage.CAPTURED,)
    gives: ClassVar[Stage | None] = None
    preserves: ClassVar[str] = "numerics"

    def __post_init__(self) -> None:
        if self.block != 0 or self.kind not in KINDS:
            _check_order(self.kind, self.block)
        for choice in self.sites:
            _check_choice(choice)
        object.__setattr__(self, "sites", tuple(tuple(choice) for choice in self.sites))  # as text they may be lists
        names = [site for site, _, _ in self.sites]
        if twice := next((name for name in names if names.count(name) > 1), ""):
            raise PlanError(f"sites of insert_hadamard: {twice}", "stands there twice", "Choose once for each site.")

    def find(self, program: Program) -> Findings:
        """Quantised sites with a block that fits.

        Raises:
            PlanError: for a choice in `sites` that the program cannot follow.
        """
        found = self._decide(program)
        misses = tuple((site, decision) for site, decision in found.items() if isinstance(decision, str))
        return Findings(tuple(site for site in found if isinstance(found[site], Rotation)), misses)

    def _decide(self, program: Program) -> dict[str, Rotation | str]:
        """By site its rotation, or why there is none."""
        layers, chosen = dict(program.sites()), {site: (kind, order) for site, kind, order in self.sites}
        if unknown := [site for site in chosen if site not in layers]:
            near = ", ".join(list(layers)[:3])
            raise PlanError(f"sites of insert_hadamard: {unknown[0]}", "no such site", f"Sites are named like {near}.")
        found: dict[str, Rotation | str] = {}
        for site, layer in layers.items():
            rule = deciding(program.plan.rules, site, "rotation")
            if rule is not None and rule.kind_and_order is not None:
                found[site] = _rotation(program, site, layer, *rule.kind_and_order, tokens=True)
                continue
            kind, order = chosen.get(site, (self.kind, self.block))
            decision = _rotation(program, site, layer, kind, order, tokens=self.tokens or site in chosen)
            exact = isinstance(decision, Rotation) and decision.block == order
            if site in chosen and order and not exact:
                reason = decision if isinstance(decision, str) else _unfit(program.plan[site].in_channels, kind, order)
                raise PlanError(
                    f"sites of insert_hadamard: {site}",
                    f"{kind} of order {order} cannot be had: {reason}",
                    "Choose another order, or 0 for no rotation.",
                )
            found[site] = decision
        return found

    def apply(self, program: Program, matches: Sequence[str]) -> Program:
        """Inserts the rotations and writes kind and block into the plan."""
        edit, found = rewrite(program), self._decide(program)
        rotated: dict[tuple[fx.Node, Rotation], fx.Node] = {}
        plans = {}
        for site in matches:
            layer, rotation = edit.layers[site], found[site]
            assert isinstance(rotation, Rotation)
            x, arguments = layer_inputs(layer)[0], (rotation.block, channel_axis(layer), *rotation.flag)
            if (x, rotation) not in rotated:
                rotated[x, rotation] = edit.call(layer, HADAMARD, x, *arguments, like=x, role="rotation")
            first = rotated[x, rotation]
            if self.weights:
                layer.replace_input_with(x, first)
                _rotate_weight(edit, site, rotation)
            else:
                back = edit.call(layer, HADAMARD, first, *arguments, like=x, site=site, role="rotation_back")
                layer.replace_input_with(x, back)
            plans[site] = replace(
                program.plan[site], block=rotation.block, rotation=rotation.kind, weight_rotated=self.weights
            )
        for plan in program.plan.sites:
            reason = found.get(plan.site)
            if plan.quantised and not plan.block and isinstance(reason, str):
                plans[plan.site] = replace(plan, reason=f"unrotated: {reason.removeprefix('unrotated: ')}")
        return edit.finish(plan=program.plan.with_sites(plans))


def _check_order(kind: str, block: int) -> None:
    if kind not in KINDS:
        raise PlanError(f"rotation kind {kind!r}", f"unknown; there are {', '.join(KINDS)}", "Use one of them.")
    if block not in ORDERS[kind]:
        others = "; ".join(f"{_either(ORDERS[other])} for {other}" for other in KINDS if other != kind)
        raise PlanError(
            f"block {block!r}",
            f"expected {_either(ORDERS[kind])} for a {kind} rotation ({others})",
            "Use 32, the method's own." if kind == "sylvester" else "Use 64, or the method's own 256.",
        )


def _check_choice(choice: Any) -> None:
    fits = isinstance(choice, (tuple, list)) and len(choice) == 3
    if not fits or not isinstance(choice[0], str) or type(choice[2]) is not int:
        raise PlanError(
            "sites of insert_hadamard", f"{str(choice)[:60]!r} is no choice", "Write (site, kind, order) for each."
        )
    _, kind, order = choice
    _check_order(kind, order or ORDERS[kind][0] if kind in KINDS else order)


def _rotation(program: Program, site: str, layer: fx.Node, kind: str, order: int, *, tokens: bool) -> Rotation | str:
    """What a site is rotated by, or why it is not."""
    if site not in program.plan:
        return UNPLANNED
    plan = program.plan[site]
    if plan.block:
        return f"rotated already, block {plan.block}"
    if not plan.quantised:
        return f"float: {plan.reason}"
    if plan.reason.startswith("unrotated"):
        return plan.reason
    if not order:
        return "asked for"
    if not tokens and len(layer_inputs(layer)[0].meta["shape"]) == 3:
        return "three-dimensional input: left unrotated as in the reference implementation"
    fitting = block_size(plan.in_channels, order, kind)
    return Rotation(fitting, kind == "regular") if fitting else _unfit(plan.in_channels, kind, order)


def _unfit(channels: int, kind: str, order: int) -> str:
    if kind == "sylvester":
        return f"{channels} input channels: no power of two from 8 to {order} divides them"
    orders = [str(each) for each in ORDERS[kind] if each <= order]
    return f"{channels} input channels: none of the {kind} orders {', '.join(orders)} divides them"


def _either(orders: Sequence[int]) -> str:
    """8, 16 or 32."""
    return f"{', '.join(map(str, orders[:-1]))} or {orders[-1]}"


def _rotate_weight(edit: Rewriter, site: str, rotation: Rotation) -> None:
    """W·Ĥ along the input channels; a weight that several sites share becomes one for each."""
    layer = edit.layers[site]
    weight = layer_inputs(layer)[1]
    value = edit.program.state[str(weight.target)]
    turned = torch.ops.hqc.hadamard(value, rotation.block, 1, rotation.regular)
    layer.replace_input_with(weight, edit.weight(f"{site}.weight_rotated", turned, layer))
