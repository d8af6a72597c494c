"""What is quantised and how: layer rules, and one `SitePlan` for each weighted layer of a program."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from hqc.attention_plan import AttentionPlan, attention_plan
from hqc.bits import (
    HIGHEST_ASYMMETRIC_BITS,
    HIGHEST_BITS,
    HIGHEST_LOOKUP_BITS,
    HIGHEST_MIXED_BITS,
    LOWEST_BITS,
    Bits,
    parse_bits,
)
from hqc.errors import PlanError
from hqc.rotations import ORDERS, Rotation
from hqc.site_names import names_site

if TYPE_CHECKING:
    from hqc.site_rules import SiteRule

__all__ = ["RULE_SETS", "QuantPlan", "Rule", "SitePlan", "decide"]


@dataclass(frozen=True)
class Rule:
    """Sites whose name matches the wildcard are left float, or get bits of their own; the last match wins.

    `float_` leaves the site unquantised; `bits` None means the bits asked for; `rotate` False forbids a rotation,
    `trained` False leaves a site with bits of its own as calibration found it.
    """

    pattern: str
    why: str
    float_: bool = False
    bits: Bits | None = None
    rotate: bool = True
    trained: bool = True

    def __str__(self) -> str:
        action = "float" if self.float_ else f"{self.bits or 'asked bits'}{'' if self.rotate else ', unrotated'}"
        return f"{self.pattern}: {action} ({self.why})"


_EDGE = Bits(8, 8)
# diffusers' names, then the original latent-diffusion names, of the same layers.
_TIME_EMBEDDING = ("time_embedding.linear_*", "time_embed.*")
_FIRST_AND_LAST = (
    *("conv_in", "conv_out", "input_blocks.0.0", "out.2"),
    *("*coder.conv_in", "*coder.conv_out", "quant_conv", "post_quant_conv"),  # of an autoencoder's halves
)
_SHORTCUTS = ("*conv_shortcut", "*skip_connection", "*downsamplers.*.conv", "*.op")

# What else makes one vector a sample that every block reads (guidance, classes, pooled text, sizes): as the time
# embedding, an error there is an error everywhere, and the layers are too small to save anything.
_OTHER_EMBEDDINGS = (
    "time_embedding.cond_proj",
    "add_embedding.linear_*",
    "class_embedding.linear_*",
    *(f"*{name}_embedder.linear_*" for name in ("timestep", "guidance", "text", "resolution", "aspect_ratio")),
)
# A transformer's patches and its condition enter through one layer each, and leave through one: as conv_in and
# conv_out. Patches have few channels of very different size, which a rotation cannot spread (4 to 64 of them).
_TRANSFORMER_EDGES = (
    *("pos_embed.proj", "x_embedder", "proj_in", "proj_out", "proj_out_2"),
    *("context_embedder", "caption_projection.linear_*", "encoder_hid_proj"),
)
# adaLN: one vector a sample becomes shift, scale and gate of all tokens of a block, so that a rounding error moves
# every token the same way and does not average out; the product is one row a sample and costs next to nothing.
_MODULATIONS = ("*norm*.linear", "adaln_single.linear", "proj_out_1")


def _edge(pattern: str, why: str, *, rotate: bool = True) -> Rule:
    """8 bits, whatever is asked for, and no training: there is nothing to gain."""
    return Rule(pattern, why, bits=_EDGE, rotate=rotate, trained=False)


_BASE = (
    Rule("*", "every conv and linear layer"),
    *(_edge(p, "time embedding", rotate=False) for p in _TIME_EMBEDDING),
    *(_edge(p, "embedding that every block reads", rotate=False) for p in _OTHER_EMBEDDINGS),
    *(_edge(p, "first or last layer", rotate=False) for p in (*_FIRST_AND_LAST, *_TRANSFORMER_EDGES)),
)
_ADALN = tuple(_edge(p, "adaLN modulation") for p in _MODULATIONS)

_VALUES_AND_OUTPUTS = tuple(
    Rule(p, "attention's values and outputs", bits=_EDGE)
    for p in ("*.to_v", "*.to_out.0", "*.add_v_proj", "*.to_add_out")
)

RULE_SETS: Mapping[str, tuple[Rule, ...]] = {
    "default": (*_BASE, *_ADALN, *(_edge(p, "shortcut or downsampler") for p in _SHORTCUTS)),
    "reference": (*_BASE, *_ADALN, *(Rule(p, "shortcut or downsampler", float_=True) for p in _SHORTCUTS)),
    "mixed": (*_BASE, *_ADALN, *(_edge(p, "shortcut or downsampler") for p in _SHORTCUTS), *_VALUES_AND_OUTPUTS),
    "all": _BASE,
}
"""`default` quantises shortcuts, downsamplers and modulations at 8 bits; `reference` leaves shortcuts and downsamplers
float, as HQ-DM's code does; `mixed` is `default` with attention's values and outputs at 8 bits (ConvRot); `all` gives
all of these the asked bits."""


@dataclass(frozen=True)
class SitePlan:
    """How one layer is treated.

    `weight_bits` and `activation_bits` are None for a site left float, and `reason` then says why. `block` is the
    order of the Hadamard rotation, 0 for none, and `rotation` its kind; `weight_rotated` says that the weight is
    quantised rotated too, so that nothing is rotated back. `lora_rank` is 0 for none; `trained` False leaves the site
    as calibrated.
    `weight_symmetric` and `activation_symmetric` False: the range of codes has a zero point, one an output channel and
    one a timestep. `smoothed`: every input channel has a factor, which the weight takes back; `shifted`: a shift too,
    which the bias does. `weight_mixed`: output channels have n - 1, n or n + 1 bits, n in the mean. `weight_lookup`:
    codes are of 8 bits, at most 2ⁿ different ones in an output channel. `branch_rank`: of the float branch beside the
    site, 0 for none. `weight_group`, `activation_group`: that many input channels have a scale together, 0 for scales
    of whole channels and of whole tensors; those of activations are of the values themselves, at every call.
    """

    site: str
    kind: str
    in_channels: int
    out_channels: int
    weight_bits: int | None = None
    activation_bits: int | None = None
    block: int = 0
    lora_rank: int = 0
    reason: str = ""
    trained: bool = True
    rotation: str = "sylvester"
    weight_rotated: bool = False
    weight_symmetric: bool = True
    activation_symmetric: bool = True
    smoothed: bool = False
    shifted: bool = False
    weight_mixed: bool = False
    branch_rank: int = 0
    weight_lookup: bool = False
    weight_residual: bool = False
    weight_group: int = 0
    activation_group: int = 0

    @property
    def quantised(self) -> bool:
        """Whether the site's product runs on codes."""
        return self.activation_bits is not None

    @property
    def weight_only(self) -> bool:
        """Whether its weight comes from codes and its activation stays float."""
        return self.weight_bits is not None and self.activation_bits is None

    @property
    def grouped(self) -> bool:
        """Whether any of its scales is of a group of channels: its product is none of whole integer rows."""
        return bool(self.weight_group or self.activation_group)

    @property
    def weight_code_bits(self) -> int:
        """Of the range that the weight's codes lie in: 8 where they come from a table."""
        return 8 if self.weight_lookup else self.weight_bits or 8

    @property
    def widths(self) -> str:
        """`w4a4`, or `float`; an asymmetric operand has a star, `w4*a4*`, a weight of mixed bits a sign: `w4±*a4*`.

        One whose codes come from a table has a tilde, `w4~a8`, and a16 stands for a float activation; one whose salient
        channels have a binary code more has a plus, `w4+*a4*`. Scales of groups of 64 channels: `w4g64a4g64`.
        """
        if self.weight_only:
            return f"w{self.weight_bits}~a16"
        if not self.quantised:
            return "float"
        stars = ["" if symmetric else "*" for symmetric in (self.weight_symmetric, self.activation_symmetric)]
        kinds = {"+": self.weight_residual, "±": self.weight_mixed, "~": self.weight_lookup}
        form = next((sign for sign, is_so in kinds.items() if is_so), "")
        groups = [f"g{group}" if group else "" for group in (self.weight_group, self.activation_group)]
        return f"w{self.weight_bits}{form}{stars[0]}{groups[0]}a{self.activation_bits}{stars[1]}{groups[1]}"

    @property
    def hadamard(self) -> Rotation | None:
        """Order and kind of its rotation, None without one."""
        return Rotation(self.block, self.rotation == "regular") if self.block else None

    @property
    def rotation_name(self) -> str:
        """What people read, empty without a rotation.

        >>> SitePlan("a", "linear", 64, 64, block=64, rotation="regular", weight_rotated=True).rotation_name
        'regular H64, weight too'
        """
        return f"{self.hadamard or ''}{', weight too' if self.weight_rotated else ''}"


@dataclass(frozen=True)
class QuantPlan:
    """The decisions for a whole program, in the order in which data meets the sites.

    rules: of a plan file, which decided instead of the recipe. attentions: those with quantisers of their own.
    """

    recipe: str = ""
    bits: str = ""
    sites: tuple[SitePlan, ...] = ()
    timesteps: tuple[float, ...] = ()
    keep_float: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple["SiteRule", ...] = ()
    attentions: tuple[AttentionPlan, ...] = ()

    def __getitem__(self, site: str) -> SitePlan:
        for plan in self.sites:
            if plan.site == site:
                return plan
        raise KeyError(site)

    def __contains__(self, site: str) -> bool:
        return any(plan.site == site for plan in self.sites)

    @property
    def quantised(self) -> tuple[SitePlan, ...]:
        """The sites that are quantised."""
        return tuple(plan for plan in self.sites if plan.quantised)

    @property
    def coded(self) -> tuple[SitePlan, ...]:
        """The sites whose weights come from codes: those, and the ones whose activations stay float."""
        return tuple(plan for plan in self.sites if plan.weight_bits is not None)

    def with_sites(self, changed: Mapping[str, SitePlan]) -> "QuantPlan":
        """The same plan with some sites replaced."""
        return replace(self, sites=tuple(changed.get(plan.site, plan) for plan in self.sites))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; without rules and attentions where there are none, as older versions wrote it."""
        from hqc.site_rules import rule_to_data  # it needs this module

        data = asdict(self)
        rules = [rule_to_data(rule) for rule in self.rules]
        del data["rules"]
        if not data["attentions"]:
            del data["attentions"]
        return {**data, "rules": rules} if rules else data

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> "QuantPlan":
        """Reads `to_dict`'s data.

        Raises:
            PlanError: if a field is missing, unknown, or of the wrong type.
        """
        from hqc.site_rules import rule_from_data  # it needs this module

        try:
            plan = QuantPlan(
                recipe=data["recipe"],
                bits=data["bits"],
                sites=tuple(_site_plan(site) for site in data["sites"]),
                timesteps=tuple(float(t) for t in data["timesteps"]),
                keep_float=tuple(data.get("keep_float", ())),
                training=dict(data.get("training", {})),
                rules=tuple(rule_from_data(rule, f"rule {i}") for i, rule in enumerate(data.get("rules", ()), 1)),
                attentions=tuple(attention_plan(one) for one in data.get("attentions", ())),
            )
            _check_fields(plan)
            return plan
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, PlanError) as error:
            found = " ".join(str(error).split())[:120]
            raise PlanError("plan.json", f"not a quantisation plan ({found})", "Write the artefact again.") from error


def _check_fields(plan: QuantPlan) -> None:
    """The fields of a plan that are not a site's.

    Raises:
        ValueError, PlanError: if one makes no sense.
    """
    if not isinstance(plan.recipe, str) or not isinstance(plan.bits, str):
        raise ValueError("the recipe and the bits are texts")
    if not all(isinstance(pattern, str) for pattern in plan.keep_float):
        raise ValueError("the patterns of keep_float are texts")
    if plan.bits:
        parse_bits(plan.bits)
    if not all(math.isfinite(t) for t in plan.timesteps):
        raise ValueError("a timestep is not finite")
    if len(set(plan.timesteps)) != len(plan.timesteps):
        raise ValueError("a timestep stands there twice")


_KINDS = ("conv2d", "linear")


def _groups(plan: SitePlan) -> tuple[int, int]:
    return plan.weight_group, plan.activation_group


def _site_plan(data: Mapping[str, Any]) -> SitePlan:
    plan = SitePlan(**data)
    texts, counts = (
        (plan.site, plan.kind, plan.reason, plan.rotation),
        (plan.in_channels, plan.out_channels, plan.block, plan.lora_rank, plan.branch_rank, *_groups(plan)),
    )
    widths = (plan.weight_bits, plan.activation_bits)
    if not all(isinstance(text, str) for text in texts) or not all(type(n) is int and n >= 0 for n in counts):
        raise ValueError(f"site {plan.site!r} has a field of the wrong type")
    if not isinstance(plan.trained, bool):
        raise ValueError(f"site {plan.site!r} is trained: {plan.trained!r}")
    quantised = all(type(b) is int and LOWEST_BITS <= b <= HIGHEST_BITS for b in widths)
    alone = widths[1] is None and type(widths[0]) is int and widths[0] >= LOWEST_BITS and plan.weight_lookup is True
    if not quantised and not alone and widths != (None, None):
        raise ValueError(f"site {plan.site!r} has widths {widths}")
    for bits, symmetric in (
        (plan.weight_bits, plan.weight_symmetric),
        (plan.activation_bits, plan.activation_symmetric),
    ):
        if type(symmetric) is not bool or (not symmetric and (bits is None or bits > HIGHEST_ASYMMETRIC_BITS)):
            raise ValueError(f"site {plan.site!r} has an asymmetric range of {bits} bits")
    if type(plan.smoothed) is not bool:
        raise ValueError(f"site {plan.site!r} is smoothed: {plan.smoothed!r}")
    if type(plan.shifted) is not bool or (plan.shifted and not plan.smoothed):
        raise ValueError(f"site {plan.site!r} is shifted: {plan.shifted!r}")
    mixable = not plan.weight_symmetric and (plan.weight_bits or 8) <= HIGHEST_MIXED_BITS
    if type(plan.weight_mixed) is not bool or (plan.weight_mixed and not mixable):
        raise ValueError(f"site {plan.site!r} has mixed weights of {plan.weight_bits} bits")
    if type(plan.weight_residual) is not bool or (plan.weight_residual and not plan.weight_mixed):
        raise ValueError(f"site {plan.site!r} has a binary code beside weights whose bits are not mixed")
    plain = plan.weight_symmetric and (plan.weight_bits or 8) <= HIGHEST_LOOKUP_BITS
    if type(plan.weight_lookup) is not bool or (plan.weight_lookup and not plain):
        raise ValueError(f"site {plan.site!r} has a table for weights of {plan.weight_bits} bits")
    if plan.weight_group and (not quantised or not plan.weight_symmetric or plan.weight_lookup):
        raise ValueError(f"site {plan.site!r} has a scale for {plan.weight_group} channels of a {plan.widths} weight")
    if plan.activation_group and (not quantised or not plan.activation_symmetric):
        raise ValueError(f"site {plan.site!r} has a scale for {plan.activation_group} channels of {plan.widths}")
    if plan.kind not in _KINDS:
        raise ValueError(f"site {plan.site!r} is a {plan.kind}")
    if plan.rotation not in ORDERS or plan.block not in (0, *ORDERS[plan.rotation]):
        raise ValueError(f"site {plan.site!r} has a {plan.rotation} rotation of order {plan.block}")
    if type(plan.weight_rotated) is not bool or (plan.weight_rotated and not plan.block):
        raise ValueError(f"site {plan.site!r} has weight_rotated {plan.weight_rotated!r} with order {plan.block}")
    return plan


def decide(site: str, rules: Sequence[Rule]) -> Rule | None:
    """The last rule whose pattern matches the site's name, or None."""
    found = None
    for rule in rules:
        if names_site(rule.pattern, site):
            found = rule
    return found
