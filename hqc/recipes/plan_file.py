"""Plan files: ordered rules over names of sites as YAML, read without executing anything, and written from a plan.

    bits: w4a4
    rules:
    - {pattern: '*', bits: w4a4}
    - {pattern: 'up_blocks.2.*', bits: w8a8, rotation: regular 64}
    - {pattern: conv_in, bits: float}

`bits` is what is asked for besides: what sites get that no rule gives any.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from hqc.bits import HIGHEST_BITS, parse_bits
from hqc.errors import PlanError
from hqc.paths import StrPath
from hqc.plan import QuantPlan, SitePlan
from hqc.recipes.files import read_yaml_file
from hqc.site_rules import FLOAT, SiteRule, rule_from_data, rule_to_data

__all__ = ["USUAL_BITS", "PlanFile", "plan_asked", "plan_of", "plan_yaml", "read_plan"]

USUAL_BITS = "w4a4"
_FIELDS = ("bits", "rules")


@dataclass(frozen=True)
class PlanFile:
    """Rules for single sites, and the bits of the others; empty: as asked for elsewhere. where: its file."""

    rules: tuple[SiteRule, ...]
    bits: str = ""
    where: str = "plan"

    def __post_init__(self) -> None:
        if self.bits:
            object.__setattr__(self, "bits", str(parse_bits(self.bits)))

    def bits_with(self, asked: str | None) -> str:
        """The bits of sites that no rule gives any: its own, what is asked for, or w4a4.

        Raises:
            PlanError: if both are there and differ.
        """
        if asked is not None and self.bits and str(parse_bits(asked)) != self.bits:
            raise PlanError(self.where, f"says bits {self.bits}, and {asked} is asked for", "Leave one of them out.")
        return self.bits or (USUAL_BITS if asked is None else asked)


def plan_asked(plan: "StrPath | PlanFile | None") -> PlanFile:
    """The plan in a file, or as it is; one without rules for None.

    Raises:
        PlanError: see `read_plan`.
    """
    if plan is None:
        return PlanFile(())
    return plan if isinstance(plan, PlanFile) else read_plan(Path(plan))


def read_plan(path: Path) -> PlanFile:
    """The plan in a YAML file.

    Raises:
        PlanError: if it is none: the file, the place, what is there, what would be.
    """
    where = f"plan {path}"
    data = read_yaml_file(path, "plan")
    if not isinstance(data, dict):
        raise PlanError(where, "is no mapping", "Write bits and rules; `hqc explain --yaml` shows one.")
    if unknown := [key for key in data if key not in _FIELDS]:
        found = f"has no field {str(unknown[0])[:60]!r}; there are {', '.join(_FIELDS)}"
        raise PlanError(where, found, "Correct it.")
    if not isinstance(data.get("rules"), list) or not data["rules"]:
        raise PlanError(where, "rules is no list", "Write one rule an item; `hqc explain --yaml` shows some.")
    rules = tuple(rule_from_data(rule, f"{where}, rule {i}") for i, rule in enumerate(data["rules"], 1))
    return PlanFile(rules, _bits(data.get("bits"), where), where)


def _bits(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise PlanError(where, f"bits is {str(value)[:60]!r}; expected wNaM", "Write it as in bits: w4a4.")
    try:
        return str(parse_bits(value))
    except PlanError as error:
        raise PlanError(where, f"{error.where}: {error.found}", error.do) from error


# ---- writing ---------------------------------------------------------------------------------------------------------


def plan_of(plan: QuantPlan, unrotated_yet: Collection[str] = ()) -> PlanFile:
    """A rule for every site that says all that it has; of ranks only where there are LoRAs, before they are merged.

    unrotated_yet: sites whose rotation nobody has chosen; the rules leave it to the recipe.
    """
    has_ranks = any(site.lora_rank for site in plan.sites)
    rules = [_rule(site, has_ranks=has_ranks) for site in plan.sites]
    rules = [replace(rule, rotation=None) if rule.pattern in unrotated_yet else rule for rule in rules]
    return PlanFile(tuple(rules), plan.bits)


def _rule(plan: SitePlan, *, has_ranks: bool) -> SiteRule:
    if not plan.quantised and not plan.weight_only:
        return SiteRule(plan.site, FLOAT)
    rotation = f"{plan.rotation} {plan.block}" if plan.block else False
    # A rule gives both widths; a recipe that leaves activations float does so whatever theirs is.
    bits = f"w{plan.weight_bits}a{plan.activation_bits or HIGHEST_BITS}"
    return SiteRule(plan.site, bits, rotation, plan.lora_rank if has_ranks else None, plan.trained)


def plan_yaml(plan: PlanFile, about: Sequence[str] = ()) -> str:
    """The plan as YAML that `read_plan` takes, one rule a line. about: lines of comment above it."""
    lines = [f"# {line}" for line in about]
    lines += [f"bits: {plan.bits}"] if plan.bits else []
    return "\n".join([*lines, "rules:", *map(_line, plan.rules)]) + "\n"


def _line(rule: SiteRule) -> str:
    text = yaml.safe_dump(rule_to_data(rule), sort_keys=False, allow_unicode=True, width=2**31, default_flow_style=True)
    return f"- {text.strip()}"
