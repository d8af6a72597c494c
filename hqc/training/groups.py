"""Which tensors training changes, and at which rate: patterns over their names, the last match wins."""

import fnmatch
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from hqc.errors import PlanError
from hqc.program import Program
from hqc.site_names import whole_site
from hqc.steps import check_options

__all__ = ["Group", "optimizer_of", "trainable"]


@dataclass(frozen=True)
class Group:
    """The tensors of trained sites whose name matches a wildcard, and how they learn.

    rate: of AdamW, falling linearly to zero. relative: "weight_scale" multiplies it by the mean weight scale of the
    tensor's own site, so that a step is the same fraction of every site's grid (EfficientDM's scale-aware rate); "own"
    by the mean |value| of the tensor itself, so that scales of every size learn at one pace.
    decay: of the weights. positive: kept above zero, as scales are.
    """

    pattern: str
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    relative: Literal["", "weight_scale", "own"] = ""
    decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    positive: bool = False

    def __post_init__(self) -> None:
        check_options(self)

    def rate_of(self, program: Program, name: str) -> float:
        """The rate of one tensor."""
        if not self.relative:
            return self.rate
        if self.relative == "own":
            return self.rate * float(program.state[name].abs().mean())
        site = name.rpartition(".")[0]
        return self.rate * float(program.state[f"{site}.{self.relative}"].mean())


def trainable(program: Program, groups: Sequence[Group], *, optional: bool = False) -> dict[str, Group]:
    """The tensors that training changes, with their group.

    A group of biases or zero points may match none: layers have no bias, codes of 8 bits no zero point. optional: any
    group may.

    Raises:
        PlanError: if any other group matches none.
    """
    sites = {plan.site for plan in program.plan.quantised if plan.trained}
    found: dict[str, Group] = {}
    matched: set[Group] = set()
    for name, tensor in program.state.items():
        if name.rpartition(".")[0] not in sites or not tensor.is_floating_point():
            continue
        fitting = [group for group in groups if _names(group.pattern, name)]
        matched.update(fitting)
        if fitting:
            found[name] = fitting[-1]
    if (
        sites
        and not optional
        and (unused := [group for group in groups if group not in matched and not _may_be_absent(group, sites)])
    ):
        raise PlanError(
            f"group {unused[0].pattern!r}",
            "matches no tensor of a trained site",
            "Correct the pattern, or put the step before it that adds the tensors (attach_lora adds *.lora_?).",
        )
    return found


_MAY_BE_ABSENT = (
    *("bias", "bias_shifted", "shift", "weight_zero", "weight_residual_scale", "activation_zero_table"),
    *("weight_below", "activation_below_table"),
)


def _may_be_absent(group: Group, sites: Collection[str]) -> bool:
    return any(fnmatch.fnmatchcase(f"{site}.{leaf}", group.pattern) for site in sites for leaf in _MAY_BE_ABSENT)


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern matches a tensor, of a site or of the one that it is a part of."""
    site, _, leaf = name.rpartition(".")
    return any(fnmatch.fnmatchcase(f"{one}.{leaf}", pattern) for one in {site, whole_site(site)})


def optimizer_of(
    program: Program, names: Mapping[str, Group], parameters: Mapping[str, nn.Parameter]
) -> torch.optim.AdamW:
    """Parameters with the same rate and decay are one group: the optimiser takes each group in one call."""
    members: dict[tuple[float, float], list[str]] = {}
    for name, group in names.items():
        members.setdefault((group.rate_of(program, name), group.decay), []).append(name)
    groups = [
        {"params": [parameters[n] for n in found], "names": found, "lr": rate, "base_lr": rate, "weight_decay": decay}
        for (rate, decay), found in members.items()
    ]
    return torch.optim.AdamW(groups, fused=True)
