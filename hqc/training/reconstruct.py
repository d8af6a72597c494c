"""Block reconstruction: unit by unit, what is quantised in a block is chosen by the block's output.

    min ‖block(x̂; W_q) - block(x)‖²       x of the float model, x̂ through the quantised units before it

Once over the units in the order in which data meets them, for one thing at a time: the rounding of weights, with float
activations, or the scales of activations, with quantised weights: those of layers, and of q, k, v and softmax of the
attentions within. The error is summed over channels and averaged over the rest. A unit whose result is no better on the
samples than what it had keeps that. A weight that several layers read stays rounded to nearest, as do layers in no unit
(`hqc.units`).

With several rounds every round goes over all units again, on samples of its own, from what the last one has learnt:
those of the quantised program's own trajectory where asked, so that it meets in training what it meets in use.

Every random number comes from (seed, round, unit, step): a run that was killed goes on behind the last unit that was
done, to the same bits. Source: BRECQ (arXiv 2102.05426), AdaRound (arXiv 2004.10568), Q-Diffusion (arXiv 2302.04304);
rounds: TCAQ-DM (arXiv 2412.16700), its progressively aligned reconstruction.
"""

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hqc.attention_checks import ATTENTION_QUANTISERS, ATTENTION_ROLES
from hqc.checkpoint import Checkpoint
from hqc.errors import ArtefactError, PlanError, TrainingError
from hqc.group_checks import refuse_training_groups
from hqc.memory import reconstruction_bytes, require_memory
from hqc.passes.rewriting import layer_inputs, rewrite
from hqc.program import BATCH, Program, Stage
from hqc.sampling import Update, Work
from hqc.sampling.sample_set import collect_samples, set_size
from hqc.stages import doing
from hqc.steps import check_options
from hqc.training.frontier import Frontier
from hqc.training.module import without_dispatcher
from hqc.training.rounding import LearntRounding, restored_weights, weight_name
from hqc.training.step_sizes import LearntScales, restored_scales
from hqc.training.trajectories import generator
from hqc.units import Unit, unit_program, units_of

__all__ = ["Reconstruct"]

Learner = LearntRounding | LearntScales
Kept = Mapping[str, Tensor]
_BEGUN = "begun/"
"""In a checkpoint: what had been learnt when the round began, which its samples come from."""
_ROWS = 32
"""Samples that are run at once outside of training."""
_TOLD_EVERY = 20
_MIXED = 0.0
"""The timestep that an update tells of: a batch mixes them."""


@dataclass(frozen=True)
class Reconstruct:
    """Learns the rounding of weights, or the scales of activations, block by block.

    samples: images of the float trajectory that the inputs are collected from, at `timesteps` of its steps, evenly
    spread; both halves of guidance are samples. iterations: steps a unit; updates: that many in all instead.
    batch_size: samples a step. rate: of Adam; of scales, relative to the scale. penalty: λ of what drives a rounding to
    either code, after the share `warm_up` of the steps. rounds: how often it goes over all units, `iterations` steps a
    unit each time. samples_from: what the inputs of the second round and later ones are collected from, the float
    trajectory or that of the quantised program as it is then. seed: of the samples and their batches.
    """

    learn: Literal["rounding", "activation_scales"] = "rounding"
    samples: Annotated[int, Field(ge=1, le=4096)] = 16
    timesteps: Annotated[int, Field(ge=1, le=1000)] = 20
    iterations: Annotated[int, Field(ge=1)] = 300
    updates: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 32
    rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 3e-2
    penalty: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.2
    rounds: Annotated[int, Field(ge=1, le=100)] = 1
    samples_from: Literal["teacher", "student"] = "teacher"
    seed: Annotated[int, Field(ge=0)] = 2024

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED,)
    gives: ClassVar[Stage | None] = None
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)

    def total(self, work: Work) -> int:
        """Steps in all."""
        units = len(units_of(work.teacher))
        return self.each(units) * units * self.rounds

    def each(self, units: int) -> int:
        """Steps a unit, in each round."""
        return max(1, self.updates // max(1, units * self.rounds)) if self.updates else self.iterations

    def cost(self, program: Program, work: Work) -> float:
        """A step of every unit is a step of the denoiser: forward and backward, 3 evaluations a sample.

        Before them the samples are collected, and both graphs are run on them once. Not counted: a unit is measured on
        all of them before and after it has learnt, 2 evaluations a sample more (4 % of q-diffusion's own budget).
        """
        trajectory = work.evaluations(self.samples)
        steps = self.each(len(units_of(work.teacher))) * self.batch_size * 3
        return float(trajectory + 2 * set_size(work, self.samples, self.timesteps) + steps) * self.rounds

    def check(self, program: Program, work: Work) -> None:
        """The values of all samples at one place of both graphs, and what a step of the largest unit keeps.

        Raises:
            MemoryShortError: if that does not fit.
        """
        units = [unit_program(program, unit) for unit in units_of(program)]
        count = set_size(work, self.samples, self.timesteps)
        require_memory(
            f"reconstructing on {count} samples",
            reconstruction_bytes(program, units, count, self.batch_size),
            "Take fewer (--set reconstruct.samples=4 or reconstruct.timesteps=10), close other programs, or take a "
            "larger machine",
        )

    def run(self, program: Program, work: Work) -> Program:
        """The program with other weights, or with other activation scales.

        Raises:
            TrainingError: if a loss is not finite, naming the unit and the step. PlanError: a site with a LoRA, or with
            scales of groups. ArtefactError: a checkpoint of another program.
        """
        refuse_training_groups(program, "reconstruct")
        reference = work.unquantised or work.teacher
        units, private = units_of(reference), _private(program)
        return _Run(self, program, reference, work, self.each(len(units))).over(units, private)

    def learner(self, program: Program, state: Mapping[str, Tensor], kept: Kept, sites: Sequence[str]) -> Learner:
        """What learns at some sites. program: as it was given; state, kept: what has been learnt."""
        if self.learn == "rounding":
            return LearntRounding(program, sites, self.rate, self.penalty, self.warm_up, kept)
        return LearntScales(program.evolve(state=state), sites, self.rate)

    def restored(self, program: Program, kept: Kept) -> dict[str, Tensor]:
        """The tensors of what was kept."""
        return (restored_weights if self.learn == "rounding" else restored_scales)(program, kept)


def _private(program: Program) -> frozenset[str]:
    """The quantised sites whose weight no other layer reads.

    Raises:
        PlanError: if one has a LoRA.
    """
    layers, found = dict(program.sites()), list[tuple[str, str]]()
    for plan in program.plan.quantised:
        if plan.lora_rank:
            raise PlanError("reconstruct", f"site {plan.site} has a LoRA", "Put attach_lora behind reconstruct.")
        found.append((plan.site, weight_name(layer_inputs(layers[plan.site])[1])))
    readers = Counter(str(n.target) for n in program.graph.nodes if n.op == "get_attr" for _ in n.users)
    return frozenset(site for site, weight in found if readers[weight] == 1)


def _with_float_activations(program: Program) -> Program:
    edit = rewrite(program)
    for node in list(edit.graph.nodes):
        if node.meta.get("role") in ("activation_quantizer", *ATTENTION_ROLES):
            node.replace_all_uses_with(node.args[0])
    return edit.finish()


class _Run:
    """One run over the units, as many rounds as asked."""

    def __init__(self, step: Reconstruct, program: Program, reference: Program, work: Work, each: int) -> None:
        self._step, self._program, self._reference, self._work = step, program, reference, work
        self._each = each
        self._student = _with_float_activations(program) if step.learn == "rounding" else program
        self._state, self._kept, self._begun = dict(program.state), dict[str, Tensor](), dict[str, Tensor]()

    def over(self, units: Sequence[Unit], private: frozenset[str]) -> Program:
        """Every unit in turn, in every round."""
        count = len(units)
        done, all_units = self._resumed(count), count * self._step.rounds
        with doing(f"reconstructing blocks ({self._step.learn.replace('_', ' ')})") as stage:
            for at in range(done, all_units):
                if at == done or at % count == 0:
                    self._begin(at // count, fresh=at % count == 0)
                stage(at, all_units)
                unit = units[at % count]
                self._unit(at, unit, self._learning(unit, private), all_units * self._each)
                if self._work.on_checkpoint is not None and at + 1 < all_units:
                    begun = {f"{_BEGUN}{name}": value.clone() for name, value in self._begun.items()}
                    self._work.on_checkpoint(Checkpoint((at + 1) * self._each, {**self._kept, **begun}))
        changed = {name: self._state[name] for name in self._program.state}
        return self._program.evolve(state=changed)

    def _begin(self, number: int, *, fresh: bool) -> None:
        """Collects the samples of a round and runs both graphs from their start. fresh: no unit of it is done."""
        if fresh:
            self._begun = dict(self._kept)
        step, source = self._step, None
        if number and step.samples_from == "student":
            source = self._program.evolve(state={**self._program.state, **step.restored(self._program, self._begun)})
        seed, what = step.seed + number, "collecting samples"
        samples = collect_samples(self._work, step.samples, step.timesteps, seed, what, source)
        self._count = len(samples)
        self._wanted = Frontier(self._reference, samples, self._reference.state, _ROWS)
        self._found = Frontier(self._student, samples, self._state, _ROWS)

    def _learning(self, unit: Unit, private: frozenset[str]) -> list[str]:
        """The sites of a unit that have something to learn, and with scales the quantisers of its attentions."""
        plan = self._program.plan
        quantised = [site for site in unit.sites if site in plan and plan[site].quantised]
        if self._step.learn == "rounding":
            return [site for site in quantised if site in private]
        inside = unit_program(self._student, unit).graph.nodes
        return quantised + [str(node.meta["site"]) for node in inside if node.meta.get("role") in ATTENTION_QUANTISERS]

    def _resumed(self, count: int) -> int:
        """How many units a checkpoint has done, over all rounds; their results are taken from it."""
        saved = self._work.checkpoint
        if saved is None:
            return 0
        parts: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for name, value in saved.tensors.items():
            parts[name.startswith(_BEGUN)][name.removeprefix(_BEGUN)] = value
        self._kept, self._begun = parts
        for kept in parts:
            try:
                found = self._step.restored(self._program, kept)
            except KeyError as error:
                raise _other_program(str(error)) from error
            for name, value in found.items():
                if name not in self._state or value.shape != self._state[name].shape:
                    raise _other_program(name)
        self._state |= self._step.restored(self._program, self._kept)
        return saved.step // self._each

    def _unit(self, number: int, unit: Unit, sites: Sequence[str], total: int) -> None:
        if not sites:
            return
        learner = self._step.learner(self._student, self._state, self._kept, sites)
        part = unit_program(self._student, unit, learner.given)
        self._wanted.behind(unit.output)
        self._found.behind(unit.inputs[-1])
        reads = [node.name for node in part.graph.nodes if node.op == "placeholder" and node.name not in learner.given]
        given = {name: self._found.value(name) for name in reads}
        task = _Task(part, given, self._wanted.value(unit.output))
        before = task.error(learner.first())
        self._learn(number, unit, learner, task, total)
        if task.error(learner.last()) < before:
            kept = learner.learnt()
            self._kept |= kept
            self._state |= self._step.restored(self._program, kept)

    def _learn(self, number: int, unit: Unit, learner: Learner, task: "_Task", total: int) -> None:
        optimizer, began = torch.optim.Adam(learner.groups), time.perf_counter()
        for step in range(self._each):
            done = step / self._each
            rows = torch.randperm(self._count, generator=generator(self._step.seed, number, step))
            values, penalty = learner.values(done)
            error, relative = task.loss(values, rows[: self._step.batch_size])
            loss = error if penalty is None else error + penalty
            value = float(loss.detach())
            if not math.isfinite(value):
                raise TrainingError(
                    f"reconstructing {unit.name}, step {step + 1}",
                    f"the loss is {value}",
                    "Lower --set reconstruct.rate, or leave its layers float (--keep-float).",
                )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * learner.factor(done)
            optimizer.step()
            learner.clip()
            if self._work.on_update is not None and ((step + 1) % _TOLD_EVERY == 0 or step + 1 == self._each):
                at, seconds = number * self._each + step + 1, time.perf_counter() - began
                self._work.on_update(Update(at, total, number, _MIXED, value, relative, seconds))
                began = time.perf_counter()


def _other_program(name: str) -> ArtefactError:
    return ArtefactError("checkpoint", f"has {name}, which this program lacks", "Start again without --resume.")


class _Task:
    """A unit with its inputs and the outputs that it should have, on all samples."""

    def __init__(self, part: Program, given: Mapping[str, Tensor], wanted: Tensor) -> None:
        inputs = [node for node in part.graph.nodes if node.op == "placeholder"]
        self._module, self._names = without_dispatcher(part.module()), [node.name for node in inputs]
        self._batched = {node.name for node in inputs if node.meta.get("shape", ())[:1] == (BATCH,)}
        self._given, self._wanted = given, wanted
        self._channels = wanted.shape[1] if wanted.ndim == 4 else wanted.shape[-1]

    def _run(self, values: Mapping[str, Tensor], rows: Tensor) -> Tensor:
        own = {name: x[rows] if name in self._batched else x for name, x in self._given.items()}
        return self._module(*[values[name] if name in values else own[name] for name in self._names])  # type: ignore[no-any-return]

    def loss(self, values: Mapping[str, Tensor], rows: Tensor) -> tuple[Tensor, float]:
        """The error that is lowered, on some of the samples, and relative to what is wanted."""
        wanted = self._wanted[rows]
        squares = (self._run(values, rows) - wanted).square().sum()
        energy = float(wanted.square().sum())
        return squares * (self._channels / wanted.numel()), float(squares.detach()) / energy if energy else 0.0

    @torch.no_grad()
    def error(self, values: Mapping[str, Tensor]) -> float:
        """The squared error on all samples."""
        chunks = torch.split(torch.arange(len(self._wanted)), _ROWS)
        return sum(float((self._run(values, rows) - self._wanted[rows]).square().sum()) for rows in chunks)
