"""The rotation of every site: its error against a computation by hand, ties, digits, the plan, refusals."""

import pytest
import torch
from torch import Tensor, nn

from hqc.calibration import ChooseRotation
from hqc.calibration.rotations import _digits, quantised_activation
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import PlanError
from hqc.passes import DropSingleKeyAttention, SelectLayers
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.program import InputSpec, Origin, Program
from hqc.recipes import find_recipe
from hqc.recipes.rotation import rotation
from hqc.sampling import Sampler, Work, synthetic_task

SAMPLER = Sampler(3, 1.0, 0.0)


class _Sites(nn.Module):
    """`spiky` reads a tensor with one large channel, `flat` one of equal sizes, `odd` channels that nothing divides."""

    def __init__(self) -> None:
        super().__init__()
        self.spiky = nn.Conv2d(64, 64, 3, padding=1)
        self.flat = nn.Conv2d(64, 12, 1)
        self.odd = nn.Conv2d(12, 64, 1)
        gains = torch.ones(64)
        gains[5] = 60.0
        self.register_buffer("gains", gains.view(1, 64, 1, 1))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = torch.sin(self.spiky(sample * self.gains) + timestep.view(-1, 1, 1, 1))
        return self.odd(torch.sign(self.flat(torch.sign(hidden))))


@pytest.fixture(scope="module")
def selected() -> Program:
    torch.manual_seed(3)
    inputs = (InputSpec("sample", ("N", 64, 4, 4)), InputSpec("timestep", ("N",)))
    return run_pass(trace(Source(_Sites(), inputs, Origin(source="sites"))), SelectLayers(bits="w4a4"))


def _work(program: Program) -> Work:
    return Work(program, synthetic_task(program), SAMPLER)


def _chosen(program: Program, step: ChooseRotation) -> Program:
    return run_procedure(program, step, _work(program))


def test_outliers_are_spread_and_equal_values_left_alone(selected: Program) -> None:
    plan = _chosen(selected, ChooseRotation()).plan
    assert plan["spiky"].block >= 16
    assert plan["flat"].block == 0  # ±1 needs no rotation
    assert plan["odd"].block == 0
    assert plan["spiky"].reason.startswith("rotation by output error: ")
    assert plan["flat"].reason.startswith("unrotated by output error: ")
    assert all(f"regular {order}" in plan["spiky"].reason for order in (16, 32, 64))
    assert "sylvester 128" not in plan["spiky"].reason  # does not divide 64


def test_the_numbers_stay_until_something_is_quantised(selected: Program) -> None:
    rotated, args = _chosen(selected, ChooseRotation()), selected.example_inputs(2)
    # A rotation and its inverse round.
    torch.testing.assert_close(rotated.module()(*args), selected.module()(*args), rtol=1e-3, atol=1e-3)
    assert rotated.stage == selected.stage
    inner, outer = rotated.history[-2:]
    assert [record.text.partition("(")[0] for record in (inner, outer)] == ["insert_hadamard", "choose_rotation"]


def test_the_same_seed_chooses_the_same(selected: Program) -> None:
    first, again = _chosen(selected, ChooseRotation()).plan, _chosen(selected, ChooseRotation()).plan
    assert first == again


def test_a_dearer_rotation_must_win_by_its_margin(selected: Program) -> None:
    plan, step = selected.plan["spiky"], ChooseRotation(tie=0.1, second_digit=0.5)
    none, small, large = ("none", 0), ("sylvester", 8), ("sylvester", 32)
    assert step._choice(selected, plan, {none: 1.0, small: 0.95, large: 0.94}) == none
    assert step._choice(selected, plan, {none: 1.0, small: 0.8, large: 0.75}) == small
    assert step._choice(selected, plan, {none: 1.0, small: 0.8, large: 0.5}) == large
    free = ChooseRotation(tie=0, second_digit=0)
    assert free._choice(selected, plan, {none: 1.0, small: 0.999, large: 0.998}) == large


def test_a_second_digit_is_counted(selected: Program) -> None:
    """Rotated by H_128 … H_8, codes of a constant row reach 8 times the order."""
    weight = torch.ones_like(selected.state["spiky.weight"])
    program = selected.evolve(state={**selected.state, "spiky.weight": weight})
    plan = program.plan["spiky"]
    tried = [("sylvester", 8), ("sylvester", 16), ("sylvester", 32), ("none", 0)]
    assert list(_digits(program, plan, tried, 7).values()) == [1, 1, 2, 1]
    assert list(_digits(program, plan, tried, 64).values()) == [1, 1, 2, 1]  # 8·8 ≤ 64, 8·16 rounds to less
    strict = ChooseRotation(second_digit=0.5)
    errors = {("none", 0): 1.0, ("sylvester", 8): 0.9, ("sylvester", 32): 0.6}
    assert strict._choice(program, plan, errors) == ("sylvester", 8)


def test_the_range_of_codes_decides_too(selected: Program) -> None:
    """Values of one sign: an asymmetric range gives them all its codes."""
    symmetric, asymmetric = (
        {one.site: one.reason for one in _chosen(selected, ChooseRotation(activation=kind)).plan.sites}  # type: ignore[arg-type]
        for kind in ("symmetric", "asymmetric")
    )
    assert symmetric["spiky"] != asymmetric["spiky"]
    x = torch.rand(2, 64, 4, 4, generator=torch.Generator().manual_seed(1))
    errors = [float((quantised_activation(x, 4, kind) - x).square().sum()) for kind in ("symmetric", "asymmetric")]  # type: ignore[arg-type]
    assert errors[1] < 0.4 * errors[0]  # half the step, a quarter of the error
    eight = [quantised_activation(x, 8, kind) for kind in ("symmetric", "asymmetric")]  # type: ignore[arg-type]
    assert torch.equal(*eight)  # 8 bits stay symmetric


def test_a_recipe_chooses_for_its_own_range() -> None:
    efficientdm, rtn = (find_recipe(name).rotated(rotation("auto")) for name in ("efficientdm", "rtn"))
    assert efficientdm.step("choose_rotation").activation == "asymmetric"
    assert rtn.step("choose_rotation").activation == "symmetric"


def test_it_runs_inside_a_recipe() -> None:
    recipe = find_recipe("rtn").rotated(rotation("auto"))
    assert "select_layers(), choose_rotation(), insert_qdq()" in recipe.text
    assert find_recipe("hqc").step("choose_rotation") is not None
    assert find_recipe("hqc").step("insert_hadamard") is None
    assert recipe.unrotated() == find_recipe("rtn")


@pytest.mark.parametrize("candidate", [("sylvester", 12), ("regular", 8), ("hadamard", 16)])
def test_candidates_that_are_no_rotation_are_refused(candidate: tuple[str, int]) -> None:
    with pytest.raises(PlanError, match=f"no rotation is {candidate[0]} of order {candidate[1]}"):
        ChooseRotation(candidates=(candidate,))


def test_an_order_with_auto_is_refused() -> None:
    with pytest.raises(PlanError, match="exclude each other"):
        rotation("auto", 16)


def test_attention_and_edges(captured) -> None:  # type: ignore[no-untyped-def]
    program = run_pipeline(captured("cross_attention"), [DropSingleKeyAttention(), SelectLayers()])
    result = _chosen(program, ChooseRotation(samples=1, timesteps=1))
    for site in ("conv_in", "conv_out", "time_embedding.linear_1"):
        assert result.plan[site].block == 0
    assert any(plan.block and plan.kind == "linear" for plan in result.plan.sites)
