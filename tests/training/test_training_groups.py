"""Which tensors a group trains, at which rate, and what a group may do without."""

import pytest
import torch
from guided_denoiser import quantised

from hqc.errors import PlanError
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.sampling import Task
from hqc.training import Group
from hqc.training.groups import optimizer_of, trainable


def test_rates_relative_to_the_tensor_itself(student: Program) -> None:
    groups = (Group("*.activation_scale_table", rate=0.005, relative="own"), Group("*.bias", rate=0.001))
    names = trainable(student, groups)
    assert {name.rpartition(".")[2] for name in names} == {"activation_scale_table", "bias"}
    parameters = {name: torch.nn.Parameter(student.state[name].clone()) for name in names}
    rates = {name: g["lr"] for g in optimizer_of(student, names, parameters).param_groups for name in g["names"]}
    for name, rate in rates.items():
        own = 0.005 * float(student.state[name].mean()) if name.endswith("table") else 0.001
        assert rate == pytest.approx(own)
    assert len(set(rates.values())) == 3  # two tables of different size, and the biases


def test_biases_and_zero_points_may_be_absent(student: Program) -> None:
    zeros, scales = Group("*.activation_zero_table", rate=0.001), Group("*.weight_scale", rate=0.001)
    assert not any("zero" in name for name in student.state)
    assert set(trainable(student, (zeros, scales)).values()) == {scales}


@pytest.mark.parametrize("pattern", ["*.weight_scal", "*.biases", "nowhere.bias"])
def test_other_patterns_that_match_nothing_are_refused(student: Program, pattern: str) -> None:
    with pytest.raises(PlanError, match="matches no tensor of a trained site"):
        trainable(student, (Group(pattern, rate=0.001),))


@pytest.mark.parametrize("bits", ["w4a3", "w8a8"])
def test_hqc_trains_what_there_is(teacher: Program, task: Task, bits: str) -> None:
    recipe = find_recipe("hqc")
    program = quantised(teacher, task, recipe.having("choose_rotation", samples=1, timesteps=1), bits)
    leaves = {name.rpartition(".")[2] for name in trainable(program, recipe.step("distil").groups)}
    zeros = {"activation_zero_table"} if bits == "w4a3" else set()  # codes of 8 bits have none
    assert leaves == {"lora_a", "lora_b", "bias", "weight_scale", "activation_scale_table"} | zeros
