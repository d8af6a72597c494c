"""What a recipe is: a method as a tuple of steps, in the order in which they run."""

import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from hqc.calibration import ChooseRotation
from hqc.errors import PlanError
from hqc.passes import InsertHadamard
from hqc.pipeline import Step, format_pipeline
from hqc.program import Stage
from hqc.sampling import Sampler
from hqc.site_rules import SiteRule
from hqc.steps import step_name, step_text, typed_option

__all__ = ["Recipe"]

Kind = Literal["ptq", "qat"]


@dataclass(frozen=True)
class Recipe:
    """One method: steps that quantise a captured program, and the sampler that they calibrate and train along.

    source: where the method is published. doc: what it computes, for `hqc recipes show`. Bits, layers to keep float and
    what is sampled are not the recipe's: they are asked for when it runs.

    Raises:
        PlanError: if the steps cannot run in this order.
    """

    name: str
    source: str
    steps: tuple[Step, ...]
    sampler: Sampler = field(default_factory=Sampler)
    doc: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        check_order(self.name, self.steps)

    @property
    def kind(self) -> Kind:
        """Whether it trains (`qat`) or not (`ptq`)."""
        return "qat" if any(step.gives == Stage.TRAINED for step in self.steps) else "ptq"

    @property
    def text(self) -> str:
        """The steps as text."""
        return format_pipeline(self.steps)

    def step(self, name: str) -> Any:
        """The first step of that name, if there is one."""
        return next((step for step in self.steps if step_name(type(step)) == name), None)

    def set(self, path: str, value: Any) -> "Recipe":
        """With one option changed, in every step of that name: `distil.epochs`, or `sampler.eta`.

        Raises:
            PlanError, PipelineTextError: if no step has it, or the value does not fit.
        """
        name, _, option = path.partition(".")
        if name == "sampler":
            return replace(self, sampler=_changed(f"--set {path}", self.sampler, option, value))
        self._require(name, path)
        own = [_changed(f"--set {path}", s, option, value) if step_name(type(s)) == name else s for s in self.steps]
        return replace(self, steps=tuple(own))

    def with_rate(self, leaf: str, rate: float) -> "Recipe":
        """With another learning rate: of the group that decides for tensors of that name (`lora_a`, `weight_scale`).

        Raises:
            PlanError: if no group does.
        """
        if all(_deciding(step, leaf) is None for step in self.steps):
            raise PlanError(f"recipe {self.name!r}", f"has no group that trains {leaf}", "Leave its rate out.")
        return replace(self, steps=tuple(_with_rate(step, leaf, rate) for step in self.steps))

    def having(self, name: str, **options: Any) -> "Recipe":
        """With options of a step changed."""
        changed = self
        for option, value in options.items():
            changed = changed.set(f"{name}.{option}", value)
        return changed

    def without(self, name: str) -> "Recipe":
        """Without the steps of that name; the same recipe if there is none."""
        return replace(self, steps=tuple(step for step in self.steps if step_name(type(step)) != name))

    def rotated(self, rotation: Step) -> "Recipe":
        """With that rotation, in place of the recipe's own or in front of insert_qdq.

        One that is chosen is chosen for the range of activation codes that the recipe gives.
        """
        if self.step("insert_qdq").activation == "float":
            found = f"recipe {self.name!r} leaves activations float, and a rotation is for their codes"
            raise PlanError("rotation", found, "Leave --hadamard out.")
        if isinstance(rotation, ChooseRotation) and self.step("insert_qdq").activation == "dynamic":
            found = f"recipe {self.name!r} has dynamic activations, and rotations are chosen by ranges of whole tensors"
            raise PlanError("rotation", found, "Name a kind and an order instead of auto.")
        if isinstance(rotation, ChooseRotation):
            rotation = replace(rotation, activation=self.step("insert_qdq").activation)
        plain = [step for step in self.steps if step_name(type(step)) not in ROTATIONS]
        place = next(i for i, step in enumerate(plain) if step_name(type(step)) == "insert_qdq")
        own = next((i for i, step in enumerate(self.steps) if step_name(type(step)) in ROTATIONS), place)
        return replace(self, steps=(*plain[:own], rotation, *plain[own:]))

    def following(self, rules: Sequence[SiteRule]) -> "Recipe":
        """With a step that rotates, if rules of a plan ask for rotations and it has none.

        Raises:
            PlanError: for what the rules ask of it and it does not do.
        """
        for rule in rules:
            if rule.rotation is True and not self.rotates:
                found = f"rotation is true, and recipe {self.name!r} does not rotate"
                raise PlanError(rule.place, found, "Write kind and order, as in 'sylvester 32'.")
            if rule.lora_rank and self.step("attach_lora") is None:
                found = f"lora_rank is {rule.lora_rank}, and recipe {self.name!r} attaches no LoRA"
                raise PlanError(rule.place, found, "Leave it out, or choose a recipe that trains one.")
        if self.rotates or not any(isinstance(rule.rotation, str) for rule in rules):
            return self
        return self.rotated(InsertHadamard(block=0))

    def unrotated(self) -> "Recipe":
        """Without a rotation."""
        return replace(self, steps=tuple(step for step in self.steps if step_name(type(step)) not in ROTATIONS))

    @property
    def rotates(self) -> bool:
        """Whether it has a rotation."""
        return any(self.step(name) is not None for name in ROTATIONS)

    def untrained(self) -> "Recipe":
        """Without what is there for training: the steps that train, and LoRA."""
        training = (*_OF_LORA, "learn_factors")
        kept = [s for s in self.steps if s.gives != Stage.TRAINED and step_name(type(s)) not in training]
        return replace(self, steps=tuple(kept))

    def named(self, name: str) -> "Recipe":
        """Under another name."""
        return replace(self, name=name)

    def _require(self, name: str, path: str) -> None:
        names = [step_name(type(step)) for step in self.steps]
        if name not in names:
            has = ", ".join(dict.fromkeys(names))
            raise PlanError(f"option {path}", f"recipe {self.name!r} has no step {name!r}; it has {has}", "Correct it.")


_OF_LORA = ("attach_lora", "init_lora")

ROTATIONS = (step_name(InsertHadamard), step_name(ChooseRotation))
"""The steps that rotate: a recipe has one of them at most."""


def _deciding(step: Any, leaf: str) -> int | None:
    """Which of a step's groups decides for tensors of that name."""
    groups = step.groups if step.gives == Stage.TRAINED else ()  # those of insert_qdq are of timesteps
    fitting = [i for i, group in enumerate(groups) if fnmatch.fnmatchcase(f"x.{leaf}", group.pattern)]
    return fitting[-1] if fitting else None


def _with_rate(step: Any, leaf: str, rate: float) -> Any:
    place = _deciding(step, leaf)
    if place is None:
        return step
    groups = [replace(group, rate=rate) if i == place else group for i, group in enumerate(step.groups)]
    return replace(step, groups=tuple(groups))


def _changed(where: str, step: Any, option: str, value: Any) -> Any:
    names = [f.name for f in fields(step)]
    if option not in names:
        has = ", ".join(names) or "none"
        raise PlanError(where, f"{step_name(type(step))} has no option {option!r}; it has {has}", "Correct it.")
    return replace(step, **{option: typed_option(where, type(step), option, value)})


# ---- the order -------------------------------------------------------------------------------------------------------

_AFTER = {
    "insert_smoothing": ("select_layers",),
    "smooth": ("insert_smoothing",),
    "attach_branch": ("select_layers",),
    "decompose": ("attach_branch",),
    "insert_hadamard": ("select_layers",),
    "choose_rotation": ("select_layers",),
    "insert_qdq": ("select_layers",),
    "mix_channel_bits": ("insert_qdq",),
    "init_lora": ("attach_lora",),
    "finetune_only": ("insert_qdq",),
    "learn_factors": ("insert_smoothing", "insert_qdq"),
    "learn_bounds": ("calibrate_activations",),
    "insert_attention_qdq": ("open_attention", "insert_qdq"),
    "choose_softmax": ("insert_attention_qdq", "calibrate_activations"),
}
_LATER = {
    "insert_qdq": ("calibrate_activations",),
    "insert_smoothing": ("smooth",),
    "attach_branch": ("decompose",),
    "learn_factors": ("calibrate_weights", "calibrate_activations"),
    "insert_attention_qdq": ("calibrate_activations",),
    "open_attention": ("insert_attention_qdq",),
}
_WITHOUT_TABLES = ("float", "dynamic")
_LEFT = {
    "insert_qdq": "scales",
    "insert_smoothing": "factors",
    "attach_branch": "branches",
    "learn_factors": "scales of other values",
    "insert_attention_qdq": "scales",
    "open_attention": "attention written out",
}
_NOT_AFTER = {"insert_smoothing": (*ROTATIONS, "attach_branch"), "smooth": ROTATIONS, "finetune_only": ("attach_lora",)}
_ONCE = (
    *("select_layers", "insert_smoothing", "attach_branch", "insert_qdq", "insert_attention_qdq"),
    *("finetune_only", "attach_lora"),
)


def _grouped(step: Step) -> bool:
    """Whether a step gives sites scales of groups."""
    return bool(getattr(step, "weight_group", 0)) or getattr(step, "activation", "") == "dynamic"


def check_order(name: str, steps: Sequence[Step]) -> None:
    """Refuses steps that cannot run one after the other, before any of them runs.

    Raises:
        PlanError: naming the first step that comes at the wrong place.
    """
    names = [step_name(type(step)) for step in steps]
    stage = Stage.CAPTURED
    for index, step in enumerate(steps):
        where, own = f"recipe {name!r}, step {index + 1} {step_text(step)}", names[index]
        if stage not in step.takes:
            wanted = " or ".join(step.takes)
            raise PlanError(where, f"takes a program that is {wanted}; here it is {stage}", "Put it elsewhere.")
        stage = step.gives or stage
        if missing := [one for one in _AFTER.get(own, ()) if one not in names[:index]]:
            raise PlanError(where, f"comes before {missing[0]}, which it needs", f"Put {missing[0]} in front of it.")
        later = () if getattr(step, "activation", "") in _WITHOUT_TABLES else _LATER.get(own, ())
        if missing := [one for one in later if one not in names[index:]]:
            raise PlanError(where, f"leaves {_LEFT[own]} that no {missing[0]} fills", f"Put {missing[0]} behind it.")
        if wrong := [one for one in _NOT_AFTER.get(own, ()) if one in names[:index]]:
            raise PlanError(
                where, f"comes behind {wrong[0]}, which reads what it changes", f"Put it in front of {wrong[0]}."
            )
        if own == "mix_channel_bits" and steps[names.index("insert_qdq")].weight not in ("mixed", "residual"):  # type: ignore[union-attr]
            raise PlanError(where, "finds no mixed weights", "Give insert_qdq(weight='mixed').")
        if getattr(step, "weight", "") == "residual" and "mix_channel_bits" not in names[index:]:
            raise PlanError(
                where, "leaves weights whose salient channels no mix_channel_bits chooses", "Put it behind."
            )
        if getattr(step, "samples_from", "") == "student" and "calibrate_activations" not in names[:index]:
            raise PlanError(
                where, "samples with scales that nothing has filled", "Put calibrate_activations in front of it."
            )
        if own in _ONCE and own in names[:index]:
            raise PlanError(where, "is there twice", "Leave one out.")
        if getattr(step, "weight", "") == "lookup" and "fit_lookup" not in names[index:]:
            raise PlanError(where, "leaves tables that no fit_lookup fills", "Put fit_lookup behind it.")
        grouped = any(_grouped(one) for one in steps[:index])
        if grouped and (step.gives == Stage.TRAINED or own in ("attach_lora", "reconstruct")):
            raise PlanError(where, "would train scales of groups, which have no gradient", "Leave one of them out.")
        if step.gives == Stage.TRAINED and "fit_lookup" in names[:index]:
            raise PlanError(where, "would train weights out of the tables of fit_lookup", "Leave one of them out.")
    if stage not in (Stage.QUANTISED, Stage.TRAINED):
        raise PlanError(f"recipe {name!r}", f"leaves the program {stage}", "End it with a quantised program.")
