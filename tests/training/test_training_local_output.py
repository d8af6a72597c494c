"""Outputs of layers as a loss: against literal sums, through the loop in every order, and who learns by it."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from hqc.errors import PlanError
from hqc.passes import AttachBranch, FinetuneOnly, InsertQdq, SelectLayers
from hqc.pipeline import run_pass, run_pipeline, run_procedure
from hqc.program import Program, Stage, copy_graph
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, run_recipe
from hqc.sampling import Sampler, Task, Update, Work
from hqc.training import Distil, Group, GuidedNoise, LocalOutput
from hqc.training.losses import Seen
from hqc.training.trajectories import walk

GROUPS = (Group("middle.weight", 1e-2, "weight_scale"), Group("middle.activation_scale_table", 1e-3, positive=True))


class _Layers(fx.Interpreter):
    """What every layer gives, by its site."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.module())
        self.found: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.meta.get("role") == "layer":
            self.found[n.meta["site"]] = value
        return value


@torch.no_grad()
def outputs(program: Program, *args: Tensor) -> dict[str, np.ndarray]:
    layers = _Layers(program)
    layers.run(*args)
    return {site: value.double().numpy() for site, value in layers.found.items()}


def squares(found: np.ndarray, wanted: np.ndarray) -> float:
    total = 0.0
    for a, b in zip(found.ravel(), wanted.ravel(), strict=True):
        total += (float(a) - float(b)) ** 2
    return total


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the loss --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [None, 0.5, torch.tensor([2.0, 3.0], dtype=torch.float64)], ids=["1", "½", "each"])
def test_the_loss_is_the_literal_sum(weight: Tensor | float | None) -> None:
    """Two layers of two samples with both halves of guidance: rows 0 and 2 are of the first."""
    loss = LocalOutput(("a", "b*"), weight=3.0)
    ours = {
        "output of a": values(4, 3, seed=1),
        "output of bc": values(4, 2, 2, 2, seed=2),
        "block x": values(1, seed=3),
    }
    theirs = {name: values(*value.shape, seed=9) for name, value in ours.items()}
    wanted = 0.0
    for name in ("output of a", "output of bc"):
        for row, (a, b) in enumerate(zip(ours[name].numpy(), theirs[name].numpy(), strict=True)):
            of_row = float(weight[row % 2]) if isinstance(weight, Tensor) else weight or 1.0
            wanted += 3 * of_row * squares(a, b)
    found = loss(Seen(torch.zeros(2), weight, ours), Seen(torch.zeros(2), weight, theirs))
    assert float(found) == pytest.approx(wanted, 1e-12)


def test_the_gradient_is_the_students_alone() -> None:
    ours, theirs = values(2, 3, seed=1).requires_grad_(), values(2, 3, seed=2).requires_grad_()
    pair = [Seen(torch.zeros(1), None, {"output of a": x}) for x in (ours, theirs)]
    LocalOutput(("a",), weight=0.5)(*pair).backward()
    torch.testing.assert_close(ours.grad, (ours - theirs).detach())
    assert theirs.grad is None


def test_taps_are_the_layers_of_both_graphs(teacher: Program, student: Program) -> None:
    loss = LocalOutput(("token", "mid*"))
    for program in (teacher, student):
        nodes = {node.name: node for node in program.graph.nodes}
        found = {name: nodes[node] for name, node in loss.taps(program).items()}
        assert {name: node.meta["site"] for name, node in found.items()} == {
            "output of token": "token",
            "output of middle": "middle",
        }
    branched = run_pipeline(teacher, [SelectLayers(), AttachBranch(rank=2), InsertQdq((0.0,))])
    nodes = {node.name: node for node in branched.graph.nodes}
    assert nodes[loss.taps(branched)["output of middle"]].meta["role"] == "branch"


def test_a_layer_that_there_is_not_is_refused(teacher: Program, task: Task, student: Program) -> None:
    loss = LocalOutput(("*time_emb*",))
    with pytest.raises(PlanError, match=r"of \*time_emb\*: names no layer. Layers are called like conv_in,"):
        loss.taps(teacher)
    with pytest.raises(PlanError, match="names no layer"):
        Distil((loss,), GROUPS).check(student, Work(teacher, task, Sampler(4, 1.5, 0.0)))
    graph = copy_graph(teacher.graph)
    next(node for node in graph.nodes if node.meta.get("site") == "middle").meta["site"] = "other"
    work = Work(teacher.evolve(graph=graph), task, Sampler(4, 1.5, 0.0))
    with pytest.raises(PlanError, match="the float program has no output of middle"):
        run_procedure(student, Distil((LocalOutput(("middle", "token")),), GROUPS, updates=1), work)


# ---- in the loop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["sampler", "shuffled", "mixed"])
def test_the_first_loss_is_that_of_the_layers_at_its_step(
    teacher: Program, student: Program, task: Task, order: str
) -> None:
    """In every order: by hand, from both graphs on the inputs of that very step, both halves of guidance."""
    heard: list[Update] = []
    losses = (LocalOutput(("middle", "token"), 2.0), GuidedNoise(0.5))
    step = Distil(losses, GROUPS, updates=1, batch_size=2, order=order)
    sampler = Sampler(4, 1.5, 0.0)
    run_procedure(student, step, Work(teacher, task, sampler, on_update=heard.append))
    module = teacher.module()

    def denoise(sample: Tensor, timestep: Tensor, condition: Tensor | None) -> Tensor:
        return module(sample, timestep, condition)

    states = list(walk(task, sampler, denoise, batch_size=2, seed=step.seed, epoch=0))

    def by_hand(rows: list[tuple[int, int]]) -> float:
        """rows: which state and which of its samples."""
        x = torch.stack([states[s].sample[n] for s, n in rows])
        t = torch.tensor([float(states[s].time_input) for s, _ in rows])
        null, condition = (torch.stack([states[s].conditions[i][n] for s, n in rows]) for i in (0, 1))
        args = torch.cat([x, x]), torch.cat([t, t]), torch.cat([null, condition])
        found, wanted = outputs(student, *args), outputs(teacher, *args)
        local = sum(squares(found[site], wanted[site]) for site in ("middle", "token"))
        halves = [one["conv_out"].reshape(2, len(rows), -1) for one in (found, wanted)]
        ours, theirs = (u + 1.5 * (c - u) for u, c in halves)
        return 2 * local + 0.5 * squares(ours, theirs)

    if order == "mixed":
        tried = [by_hand([a, b]) for a in _places() for b in _places() if a != b]
        assert min(abs(heard[0].loss / one - 1) for one in tried) < 1e-4
        return
    place = next(i for i, state in enumerate(states) if state.timestep == heard[0].timestep)
    assert heard[0].loss == pytest.approx(by_hand([(place, 0), (place, 1)]), 1e-4)


def _places() -> list[tuple[int, int]]:
    return [(s, n) for s in range(4) for n in range(2)]


@pytest.mark.parametrize("order", ["sampler", "shuffled"])
def test_only_what_is_selected_learns(teacher: Program, task: Task, order: str) -> None:
    """Two groups, one site: every other tensor is equal to the bit, and the layer's own output is nearer."""
    short = find_recipe("rtn").having("calibrate_activations", samples=4, candidates=20)
    request, sampler = Request("w4a4", timesteps=task.timesteps(4)), Sampler(4, 1.5, 0.0)
    plain = run_recipe(teacher, short, request, Work(teacher, task, sampler))
    chosen = run_pass(plain, FinetuneOnly(("middle",), share=1.0))
    every = (Group("*.weight", 3e-2, "weight_scale"), Group("*.activation_scale_table", 5e-3, "own", positive=True))
    step = Distil((LocalOutput(("middle",)),), every, epochs=8, batch_size=4, order=order)
    losses: list[float] = []
    work = Work(teacher, task, sampler, on_update=lambda update: losses.append(update.loss))
    result = run_procedure(chosen, step, work)
    changed = {name for name, value in result.state.items() if not torch.equal(value, plain.state[name])}
    assert changed == {"middle.weight", "middle.activation_scale_table"}
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert result.history[-1].touched == ("middle",)


def test_an_optional_training_without_layers_says_so_by_changing_nothing(
    teacher: Program, student: Program, task: Task
) -> None:
    groups = (Group("*time_emb*.weight", 1e-2),)
    step, work = Distil((LocalOutput(("*time_emb*",)),), groups, updates=1), Work(teacher, task, Sampler(4, 1.5, 0.0))
    with pytest.raises(PlanError, match="matches no tensor of a trained site"):
        run_procedure(student, step, work)
    optional = replace(step, optional=True)
    optional.check(student, work)
    result = run_procedure(student, optional, work)
    assert result.stage == Stage.TRAINED
    assert result.state == student.state
    assert result.history[-1].touched == ()


def test_taps_out_of_order_cost_an_evaluation(student: Program, teacher: Program, task: Task) -> None:
    work = Work(teacher, task, Sampler(4, 1.5, 0.0))
    plain, local = (
        {o: Distil(losses, GROUPS, updates=10, batch_size=2, order=o).cost(student, work) for o in ("sampler", "mixed")}
        for losses in ((GuidedNoise(),), (LocalOutput(("middle",)),))
    )
    assert plain["sampler"] == plain["mixed"] == local["sampler"] == 10 * 2 * 2 * 4
    assert local["mixed"] == 10 * 2 * 2 * 5
