"""The rules of a plan file: what single sites get instead of what the recipe gives them.

    - {pattern: "up_blocks.2.*", bits: w8a8, rotation: regular 64, lora_rank: 16, why: sensitive}

A rule says something about the sites whose name matches its wildcard, and leaves the rest to earlier rules, then to the
recipe: the last rule that says it decides, for each of bits, rotation, LoRA rank and training by itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from hqc.bits import parse_bits
from hqc.errors import PipelineTextError, PlanError
from hqc.plan import Rule
from hqc.rotations import ORDERS
from hqc.site_names import names_site
from hqc.steps import typed_option

__all__ = ["FLOAT", "SiteRule", "changed", "deciding", "rule_from_data", "rule_to_data"]

FLOAT = "float"
_ASKED = "asked for in the plan"
_EXPECTED = {
    "pattern": "a text, a wildcard over names of sites",
    "bits": f"wNaM, or {FLOAT}",
    "rotation": "true, false, or kind and order as in 'sylvester 32'",
    "lora_rank": "a whole number, 0 for none",
    "trained": "true or false",
    "why": "a text",
}


@dataclass(frozen=True)
class SiteRule:
    """What the sites get whose name matches the wildcard; what is left out an earlier rule decides, or the recipe.

    bits: `wNaM`, or "float". rotation: True as the recipe rotates, False not at all, "regular 64" by the largest order
    of that kind, up to that one, that divides the channels. lora_rank: 0 for none. trained: False leaves a site as
    calibrated. why: for people. where: file and place, for messages.

    Raises:
        PlanError: if a value is none that it may be.
    """

    pattern: str
    bits: str = ""
    rotation: bool | str | None = None
    lora_rank: int | None = None
    trained: bool | None = None
    why: str = ""
    where: str = field(default="", compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, expected in _EXPECTED.items():
            value = getattr(self, name)
            try:
                typed_option(self.place, SiteRule, name, value)
            except PipelineTextError as error:
                found = f"{name} is {str(value)[:60]!r}; expected {expected}"
                raise PlanError(self.place, found, "Correct it.") from error
        if self.lora_rank is not None and self.lora_rank < 0:
            raise PlanError(self.place, f"lora_rank is {self.lora_rank}; expected 0 or more", "Correct it.")
        if not self.pattern:
            raise PlanError(self.place, "its pattern is empty", "Write '*' for every site.")
        if self.bits not in ("", FLOAT):
            try:
                parse_bits(self.bits)
            except PlanError as error:
                raise PlanError(self.place, f"{error.where}: {error.found}, or {FLOAT}", error.do) from error
        if isinstance(self.rotation, str):
            _rotation(self.place, self.rotation)
        if self.lora_rank and (self.trained is False or self.bits == FLOAT):
            why = "trained is false" if self.bits != FLOAT else "its bits are float"
            raise PlanError(self.place, f"lora_rank is {self.lora_rank}, and {why}", "Leave one of them out.")

    def __str__(self) -> str:
        said = [f"{name} {value}" for name, value in rule_to_data(self).items() if name not in ("pattern", "why")]
        return f"{self.pattern}: {', '.join(said)} ({self.why or _ASKED})"

    @property
    def place(self) -> str:
        """Where the rule stands, for messages."""
        return self.where or f"plan rule {str(self.pattern)[:60]!r}"

    @property
    def kind_and_order(self) -> tuple[str, int] | None:
        """The rotation that it asks for: order 0 for none, None where it leaves that to the recipe.

        >>> SiteRule("*", rotation="regular 64").kind_and_order, SiteRule("*", rotation=False).kind_and_order
        (('regular', 64), ('sylvester', 0))
        """
        if isinstance(self.rotation, str):
            return _rotation(self.place, self.rotation)
        return ("sylvester", 0) if self.rotation is False else None

    def matches(self, site: str) -> bool:
        """Whether a site's name, or that of the site it is a part of, matches the wildcard."""
        return names_site(self.pattern, site)


def _rotation(place: str, text: str) -> tuple[str, int]:
    kind, _, order = text.partition(" ")
    if kind not in ORDERS or not order.isdecimal() or int(order) not in ORDERS[kind]:
        there = "; ".join(f"{one} {', '.join(map(str, orders))}" for one, orders in ORDERS.items())
        raise PlanError(place, f"rotation is {text[:60]!r}; there are {there}", "Write kind and order, true or false.")
    return kind, int(order)


Saying = Literal["bits", "rotation", "lora_rank", "trained"]


def deciding(rules: Sequence[SiteRule], site: str, what: Saying) -> SiteRule | None:
    """The last rule that matches the site and says something about that, if there is one."""
    said = (rule for rule in reversed(rules) if rule.matches(site) and getattr(rule, what) not in ("", None))
    return next(said, None)


def changed(rule: Rule | None, rules: Sequence[SiteRule], site: str) -> Rule | None:
    """The recipe's rule for a site with the bits and the rotation that a plan's rules give it instead."""
    bits, rotation = deciding(rules, site, "bits"), deciding(rules, site, "rotation")
    if bits is not None and bits.bits == FLOAT:
        return Rule(bits.pattern, bits.why or _ASKED, float_=True)
    if bits is not None:
        rule = replace(rule or Rule(bits.pattern, bits.why), float_=False, bits=parse_bits(bits.bits))
    if rule is None or rotation is None:
        return rule
    if rotation.rotation is False:
        return replace(rule, rotate=False, why=rule.why if rule.float_ else rotation.why or _ASKED)
    return replace(rule, rotate=True)


# ---- as plain data ---------------------------------------------------------------------------------------------------


def rule_to_data(rule: SiteRule) -> dict[str, Any]:
    """What the rule says, as YAML has it."""
    values = {name: getattr(rule, name) for name in _EXPECTED}
    return {name: value for name, value in values.items() if value not in ("", None)}


def rule_from_data(data: Any, where: str) -> SiteRule:
    """The rule that `rule_to_data` wrote.

    Raises:
        PlanError: naming the place and what is wrong there.
    """
    if not isinstance(data, dict):
        raise PlanError(where, f"is {str(data)[:60]!r}; expected a mapping", "Write {pattern: conv_in, bits: w8a8}.")
    if unknown := [key for key in data if key not in _EXPECTED]:
        said = f"has no field {str(unknown[0])[:60]!r}; there are {', '.join(_EXPECTED)}"
        raise PlanError(where, said, "Correct it.")
    if data.get("pattern") is None:
        raise PlanError(where, "lacks its pattern", "Write the name of a site, or a wildcard.")
    given = {name: value for name, value in data.items() if value is not None}
    if not given.keys() - {"pattern", "why"}:
        raise PlanError(where, "says nothing about its sites", "Give bits, rotation, lora_rank or trained.")
    return SiteRule(**given, where=where)
