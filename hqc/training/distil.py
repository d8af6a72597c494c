"""Distillation: the quantised graph learns the float graph's noise along the float sampler's trajectory.

    each epoch   a seed of its own; random conditions; x_T ~ N(0, I)
    each step    ε = teacher, ε̂ = student on the same x_t, both combined by guidance
                 L = the sum of the losses;  AdamW;  linear decay
                 x_{t-1} = sampler step with the teacher's ε; with `own_share` also the student's own trajectories

Every random number comes from (seed, epoch, step), so a run that was killed continues to the same bits.
Source: HQ-DM's training loop; EfficientDM (arXiv 2310.03270).
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hqc.errors import PlanError, TrainingError
from hqc.group_checks import refuse_training_groups
from hqc.memory import require_memory, training_bytes
from hqc.processes import Processes
from hqc.program import Program, Stage, digest_of
from hqc.sampling import Update, Work, guided
from hqc.sampling.image_gain import image_gain
from hqc.sampling.task import Denoise
from hqc.steps import check_options, step_name
from hqc.training.groups import Group, trainable
from hqc.training.losses import GuidedNoise, Loss, Seen
from hqc.training.queue import Queues
from hqc.training.shares import shared, state_rows, whole_batch
from hqc.training.step_weights import step_weights
from hqc.training.student import Student
from hqc.training.taps import Before, Tapped, taps_of
from hqc.training.trajectories import Epochs, Order, State
from hqc.training.validation import HeldOut

__all__ = ["Distil"]

_WEIGHED_SAMPLES = 8


@dataclass(frozen=True)
class Distil:
    """Trains the tensors of the groups: `epochs` trajectories of the sampler, an update a step of them.

    updates: that many in all instead. batch_size: images of a trajectory. seed: of noise and conditions.
    order: of the updates of a trajectory: the "sampler"'s, its steps "shuffled", or batches that are "mixed" from all
    its steps. weighting: "effect" weighs a step by what an error there does to the image (`step_weights`). own_share:
    up to which share of the trajectories, growing linearly from none, are the student's own instead of the teacher's.
    warm_up: share of the updates in which the rates grow to their own. ema: decay of the averages that are the result
    (0: the last values are). checkpoint_every, validate_every: updates between checkpoints, and between measurements on
    a trajectory that is held out (0: none); they do not change the result. optional: the groups may match no tensor of
    a trained site, and then nothing is trained.
    """

    losses: tuple[Loss, ...] = (GuidedNoise(),)
    groups: tuple[Group, ...] = ()
    epochs: Annotated[int, Field(ge=1)] = 30
    updates: Annotated[int, Field(ge=1)] | None = None
    batch_size: Annotated[int, Field(ge=1, le=1024)] = 8
    seed: Annotated[int, Field(ge=0)] = 3407
    order: Order = "sampler"
    weighting: Literal["uniform", "effect"] = "uniform"
    own_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.0
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    optional: bool = False
    checkpoint_every: Annotated[int, Field(ge=1)] = field(default=200, compare=False)
    validate_every: Annotated[int, Field(ge=0)] = field(default=0, compare=False)

    takes: ClassVar[tuple[Stage, ...]] = (Stage.QUANTISED, Stage.TRAINED)
    gives: ClassVar[Stage | None] = Stage.TRAINED
    samples_denoiser: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_options(self)
        if not self.losses or not self.groups:
            raise PlanError("distil", "has no losses or no groups", "Say what is lowered, and which tensors learn.")
        if self.order != "sampler" and (needing := [loss for loss in self.losses if loss.in_order]):
            found = f"its steps are {self.order}; {step_name(type(needing[0]))} sees neighbouring ones"
            raise PlanError("distil", found, "Take order='sampler', or leave the loss out.")

    def total(self, work: Work) -> int:
        """Updates in all."""
        return self.updates or self.epochs * work.sampler.num_inference_steps

    def cost(self, program: Program, work: Work) -> float:
        """A step runs the teacher once and the student forward and backward: 4 evaluations a sample.

        The student's own trajectories are an evaluation more, and so is the teacher for losses that see more than its
        noise, where the steps are not the sampler's. Weighing is a trajectory, and for every step the student
        there and the teacher on what follows.
        """
        steps = work.sampler.num_inference_steps
        again = self._walked_ahead and any(loss.tapped for loss in self.losses)
        updates = self.total(work) * self.batch_size * (4 + self.own_share / 2 + again)
        weighing = _WEIGHED_SAMPLES * (2 * steps + steps * (steps - 1) / 2) if self.weighting == "effect" else 0
        return float((updates + weighing) * work.halves())

    def check(self, program: Program, work: Work) -> None:
        """A step runs a batch, twice as large with guidance, and keeps what the backward pass needs.

        Raises:
            MemoryShortError: if that does not fit. PlanError: for a loss of a block that there is not.
            TrainingError: for a batch that cannot be shared among processes.
        """
        work.processes.rows(self.batch_size)
        if not self.optional:
            taps_of(self.losses, work.teacher)
        here = self.batch_size // work.processes.count * work.processes.here
        require_memory(
            f"training on batches of {self.batch_size}",
            work.processes.here * program.size_bytes() + training_bytes(program, here * work.halves()),
            "Take a smaller --batch-size, close other programs, or take a larger machine",
        )

    def run(self, program: Program, work: Work) -> Program:
        """The trained program.

        Raises:
            TrainingError: if the loss is not finite, naming the step. ArtefactError: a checkpoint of another program.
            PlanError: for scales of groups, which have no gradient.
        """
        refuse_training_groups(program, step_name(type(self)))
        total, sampler, processes = self.total(work), work.sampler, work.processes
        if processes.count > 1:
            processes.require_same("the program before training", digest_of(program))
        live = self.opened(program)
        names = trainable(live, self.groups, optional=self.optional)
        if self.optional and not names:
            return program
        taps = taps_of(self.losses, program)
        share = self.batch_size // processes.count
        student = Student(live, names, share * work.halves(), self.ema, taps, processes)
        teacher = self._teacher(work, taps)
        whole = partial(whole_batch, processes=processes, halves=work.halves())
        before, queues = Before(self.losses), Queues(self.losses, whole)
        weights, gains = self._weights(work, teacher, student.denoise), self._image_gains(work)
        epochs = Epochs(work.sampled, sampler, self.batch_size, self.seed, self.order, self.own_share, total)
        first = 0
        if work.checkpoint is not None:
            student.restore(work.checkpoint)
            first = work.checkpoint.step
            epochs.restore(work.checkpoint)
            before.restore(work.checkpoint, processes)
            queues.restore(work.checkpoint)
        held_out = self._held_out(work, teacher)
        began, inputs = time.perf_counter(), work.teacher.inputs
        walking = [shared(denoise, processes, inputs) for denoise in (teacher, student.denoise)]
        for batch in epochs.states(walking[0], walking[1], first):
            state = state_rows(batch, processes, inputs)
            found = guided(student.denoise, state.sample, state.time_input, state.conditions, sampler.guidance_scale)
            if (self._walked_ahead or processes.count > 1) and teacher.values:
                with torch.no_grad():  # its taps are those of the trajectory's last step, or of other rows
                    guided(teacher, state.sample, state.time_input, state.conditions, sampler.guidance_scale)
            weight, earlier = state.weights(weights), before.begin(state.epoch)
            place = state.step % epochs.length
            seen = Seen(found, weight, student.denoise.values, earlier[0])
            near, gain = queues.near(place), state.weights(gains)
            wanted = Seen(state.wanted, weight, teacher.values, earlier[1], near, gain)
            loss = self._loss(seen, wanted)
            update = _update(state, total, found, loss, processes)
            if not update.loss < float("inf"):  # of all processes, so that all of them say it
                found_loss = f"the loss is {update.loss}"
                raise TrainingError(f"training step {update.step}", found_loss, "Lower --lr-lora or the bits' risk.")
            before.add(seen.taps, teacher.values)
            queues.add(teacher.values, place)
            student.learn(loss, self._factor(state.step, total))
            done = state.step + 1
            if work.on_update is not None:
                work.on_update(replace(update, seconds=time.perf_counter() - began))
            if held_out is not None and work.on_validation is not None and done % self.validate_every == 0:
                work.on_validation(held_out.measure(student.denoise, done))
            if work.on_checkpoint is not None and done % self.checkpoint_every == 0 and done < total:
                kept = {**epochs.kept, **before.snapshot(processes), **queues.snapshot()}
                work.on_checkpoint(student.snapshot(done, kept))
            began = time.perf_counter()
        return self.closed(student.result(), program)

    def opened(self, program: Program) -> Program:
        """The program that learns: this one, unless a step learns other tensors than it has."""
        return program

    def closed(self, learnt: Program, program: Program) -> Program:
        """The program with what its opened one has learnt."""
        return learnt

    @property
    def _walked_ahead(self) -> bool:
        """Whether a trajectory is whole before its first update."""
        return self.order != "sampler"

    def _teacher(self, work: Work, taps: Mapping[str, str]) -> Tapped:
        """The float graph with its taps. For outputs of layers it is the one that has the student's layers."""
        by_layer = any(loss.by_layer for loss in self.losses)
        reference = (by_layer and work.unquantised) or work.teacher
        found = taps_of(self.losses, reference)
        if missing := [name for name in taps if name not in found]:
            raise PlanError("distil", f"the float program has no {missing[0]}", "Run it as a step of a recipe.")
        return Tapped(reference.module(), {name: found[name] for name in taps})

    def _factor(self, step: int, total: int) -> float:
        """Of the rates: up to 1 while it warms up, and linearly down to 0."""
        warm = self.warm_up * total
        return (1 - step / total) * (min(1.0, (step + 1) / warm) if warm else 1.0)

    def _weights(self, work: Work, teacher: Denoise, student: Denoise) -> dict[float, float] | None:
        """By timestep; the student is the calibrated one, also where a checkpoint is about to be restored."""
        if self.weighting == "uniform":
            return None
        task, sampler = work.sampled, work.sampler
        found = step_weights(task, sampler, teacher, student, samples=_WEIGHED_SAMPLES, seed=self.seed)
        times = task.scheduler(sampler.num_inference_steps).timesteps
        return {float(t): weight for t, weight in zip(times, found, strict=True)}

    def _image_gains(self, work: Work) -> dict[float, float] | None:
        """By timestep, where a loss asks for them."""
        if not any(loss.in_images for loss in self.losses):
            return None
        scheduler = work.sampled.scheduler(work.sampler.num_inference_steps)
        return {float(t): image_gain(scheduler, float(t)) for t in scheduler.timesteps}

    def _held_out(self, work: Work, teacher: Denoise) -> HeldOut | None:
        if not self.validate_every or work.on_validation is None:
            return None
        return HeldOut(work.sampled, work.sampler, teacher, self.batch_size)

    def _loss(self, student: Seen, teacher: Seen) -> Tensor:
        first, *more = (loss(student, teacher) for loss in self.losses)
        for one in more:
            first = first + one
        return first


def _update(state: State, total: int, found: Tensor, loss: Tensor, processes: Processes) -> Update:
    """Of the whole batch, before it is made."""
    error, energy = (found.detach() - state.wanted).square().sum(), state.wanted.square().sum()
    value, error, energy = processes.summed(torch.stack([loss.detach(), error, energy]))
    return Update(state.step + 1, total, state.epoch, state.timestep, float(value), float(error / energy), 0.0)
