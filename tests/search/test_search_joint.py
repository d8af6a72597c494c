"""Bits and ranks together: costs and repairs by hand, NSGA-II against every plan, the process, a search end to end."""

import json
import math
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import ok, refused

import hqc
from hqc.errors import HqcError
from hqc.program import Program
from hqc.recipes import Recipe, find_recipe
from hqc.recipes.plan_file import plan_yaml, read_plan
from hqc.sampling import synthetic_task
from hqc.search import parse_budget
from hqc.search.joint import Adapted, AskedJointly, adapt
from hqc.search.joint.front import front, undominated
from hqc.search.joint.gains import _share
from hqc.search.joint.gaussian import GaussianProcess, expected_improvement
from hqc.search.joint.run import require_optuna
from hqc.search.joint.space import Plan, Space
from hqc.storage import save_program

pytest.importorskip("optuna")
Captured = Callable[[str], Program]


def space(limit: int) -> Space:
    """Four sites, three widths, two ranks: 1296 plans."""
    generator = torch.Generator().manual_seed(3)
    sizes = (10, 40, 25, 5)
    weights = torch.rand(4, generator=generator).tolist()
    return Space(
        ("a", "b", "c", "d"),
        ("w2a8", "w4a8", "w8a8"),
        [[2 * n, 4 * n, 8 * n] for n in sizes],
        [[w, w / 12, w / 200] for w in weights],
        [(4, 8)] * 4,
        [[7, 14]] * 4,
        [[0.8, 0.7], [0.9, 0.5], [0.6, 0.55], [1.0, 0.4]],
        100,
        0.01,
        limit,
    )


def every(found: Space) -> list[Plan]:
    return [plan for plan in product(list(product(range(3), range(2))), repeat=4) if found.cost(plan) <= found.limit]


def volume(found: Space, plans: Sequence[Plan]) -> float:
    """What a front dominates of the box up to the smallest plan's loss and the limit."""
    worst, total, above = found.loss(found.smallest), 0.0, found.loss(found.smallest)
    for plan in reversed(undominated(found, plans)):
        total += (found.limit - found.cost(plan)) * (above - found.loss(plan))
        above = found.loss(plan)
    return total / (worst * found.limit)


def test_costs_and_losses_by_hand() -> None:
    found, plan = space(1000), ((1, 0), (0, 1), (2, 0), (0, 0))
    assert found.cost(plan) == 100 + (40 + 7) + (80 + 14) + (200 + 7) + (10 + 7)
    by_hand = found.losses[0][1] * 0.8 + found.losses[1][0] * 0.5 + found.losses[2][2] * 0.6 + found.losses[3][0]
    assert found.loss(plan) == pytest.approx(0.01 + by_hand)
    assert found.choices(plan) == {"a": ("w4a8", 4), "b": ("w2a8", 8), "c": ("w8a8", 4), "d": ("w2a8", 4)}


def test_a_repaired_plan_is_within_the_limit_and_none_of_its_steps_was_needless() -> None:
    found = space(500)
    largest = ((2, 1),) * 4
    fixed = found.repaired(largest)
    assert found.cost(fixed) <= 500
    assert all(low[0] <= 2 and low[1] <= 1 for low in fixed)
    assert found.repaired(fixed) == fixed
    assert all(found.cost(plan) <= 500 for plan in found.neighbours(fixed))


def test_the_front_is_nearly_that_of_all_plans() -> None:
    found = space(500)
    best = volume(found, every(found))
    made = front(found, 300, 30, 5)
    assert volume(found, made) >= 0.95 * best
    assert made == front(found, 300, 30, 5), "the same seed gives the same front"
    assert all(found.cost(plan) <= 500 for plan in made)


def test_the_process_goes_through_what_it_has_seen() -> None:
    points = [(0.0, 0.0), (1.0, 0.0), (0.5, 0.5), (0.0, 1.0)]
    values = [1.0, 2.0, 0.5, 1.5]
    process = GaussianProcess(points, values)
    mean, deviation = process.predict([*points, (50.0, 50.0)])
    np.testing.assert_allclose(mean[:4], values, atol=0.02)
    assert deviation[:4].max() < 0.05
    assert mean[4] == pytest.approx(np.mean(values))
    assert deviation[4] == pytest.approx(np.std(values), rel=1e-3)


def test_expected_improvement_is_the_integral() -> None:
    grid = np.linspace(-8, 8, 40_001)
    for mean, deviation, best in ((0.0, 1.0, 0.5), (1.0, 0.3, 0.5), (0.2, 2.0, -1.0)):
        density = np.exp(-0.5 * grid**2) / math.sqrt(2 * math.pi)
        wanted = (np.maximum(best - (mean + deviation * grid), 0) * density).sum() * (grid[1] - grid[0])
        found = expected_improvement(np.array([mean]), np.array([deviation]), best)
        assert float(found[0]) == pytest.approx(wanted, rel=1e-4)
    assert expected_improvement(np.array([0.5]), np.array([0.0]), 1.0)[0] == 0.5


def test_what_a_rank_keeps_of_a_delta() -> None:
    torch.manual_seed(1)
    down, up = torch.randn(6, 20), torch.randn(12, 6)
    energy = torch.linalg.svdvals((up @ down).double()).square()
    for rank in (1, 3, 6, 9):
        assert _share(down, up, rank) == pytest.approx(float(energy[:rank].sum() / energy.sum()), rel=1e-5)
    assert _share(down, torch.zeros(12, 6), 2) == 1.0


# ---- end to end ------------------------------------------------------------------------------------------------------


def brief(name: str = "hq-dm") -> Recipe:
    recipe = find_recipe(name).set("sampler.num_inference_steps", 2).set("calibrate_activations.samples", 1)
    return recipe.set("distil.epochs", 1).set("distil.batch_size", 2) if recipe.step("distil") else recipe


def adapted(program: Program, budget: str, folder: Path | None = None, recipe: str = "hq-dm") -> Adapted:
    asked = AskedJointly(
        parse_budget(budget), ("w8a8", "w3a8"), (2, 4), samples=1, timesteps=2, trials=60, population=20, trainings=3
    )
    return adapt(program, brief(recipe), synthetic_task(program), asked, folder=folder)


def test_a_plan_of_bits_and_ranks(captured: Captured, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = captured("without_attention")
    found = adapted(program, "60%", tmp_path / "w")
    assert 1 <= len(found.trained) <= 3
    assert found.best.measured == min(one.measured for one in found.trained)
    assert all(one.cost <= found.budget for one in found.trained)
    assert found.ends[0] <= found.budget <= found.ends[1]
    assert {rank for _, rank in found.best.choices.values()} <= {2, 4}
    (tmp_path / "plan.yaml").write_text(plan_yaml(found.plan), encoding="utf-8")
    made = hqc.qat(program, brief(), plan=tmp_path / "plan.yaml", task=synthetic_task(program)).plan
    assert {site: (made[site].widths, made[site].lora_rank) for site in found.best.choices} == dict(found.best.choices)

    def never(*args: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("hqc.search.measure.run_recipe", never)
    assert adapted(program, "60%", tmp_path / "w") == found, "everything is kept in the work folder"


@pytest.mark.parametrize(
    ("budget", "recipe", "said"),
    [
        ("60%", "rtn", "recipe 'rtn': trains no LoRA"),
        ("9GBOPs", "hq-dm", "--budget 9GBOPs: is of bit operations, which ranks do not take"),
        ("1kB", "hq-dm", "--budget 1kB: is below every plan of w3a8, w8a8. Give one from "),
    ],
)
def test_refusals(captured: Captured, budget: str, recipe: str, said: str) -> None:
    with pytest.raises(HqcError) as caught:
        adapted(captured("without_attention"), budget, recipe=recipe)
    assert caught.value.line.startswith(said)


def test_without_optuna(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.search.joint.run.find_spec", lambda name: None)
    with pytest.raises(HqcError, match=r"needs optuna, which is not installed\. pip install 'hqc\[search\]'"):
        require_optuna()


def test_the_command(captured: Captured, tmp_path: Path) -> None:
    source, plan, chart = tmp_path / "p.hqc", tmp_path / "plan.yaml", tmp_path / "chart.svg"
    save_program(captured("without_attention"), source)
    few = "--synthetic --n-steps 2 --calib-size 1 --samples 1 --timesteps 1 --candidates w3a8,w8a8 --ranks 2,4"
    options = [*few.split(), "--trials", "20", "--population", "10", "--trainings", "1", "--set", "distil.batch_size=1"]
    said = refused(tmp_path, "qr-adaptor", source, "--budget", "50%", "-o", plan, *options, "--chart", "x.pdf")
    assert said.startswith("--chart x.pdf: is neither")
    data = json.loads(
        ok("qr-adaptor", source, "--budget", "50%", "-o", plan, *options, "--chart", chart, "--json").stdout
    )
    assert len(data["trained"]) == 1
    assert chart.read_text().count("<svg") == 1
    assert {rule.lora_rank for rule in read_plan(plan).rules} <= {2, 4}
