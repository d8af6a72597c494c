"""The distillation loop: its loss by an independent computation, what it changes, its learning rates, its refusals."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
import zoo
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler
from guided_denoiser import Settings, distil, task_with, trained_tensors
from torch import Tensor

from hqc.errors import TrainingError
from hqc.program import Program, Stage
from hqc.sampling import Task, Update
from hqc.sampling.task import start
from hqc.training import trajectories
from hqc.training.trajectories import generator

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")


class _Recorder(torch.optim.AdamW):
    """AdamW that notes the learning rate and the gradient of every tensor at every step."""

    made: ClassVar["list[_Recorder]"] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rates: list[dict[str, float]] = []
        self.gradients: list[dict[str, Tensor | None]] = []
        self.made.append(self)

    def step(self, closure: Any = None) -> Any:
        self.rates.append({name: g["lr"] for g in self.param_groups for name in g["names"]})
        members = [pair for g in self.param_groups for pair in zip(g["names"], g["params"], strict=True)]
        found = {name: parameter.grad for name, parameter in members}
        self.gradients.append({name: None if g is None else g.clone() for name, g in found.items()})
        return super().step(closure)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], _Recorder]]:
    """recorder() is the optimiser of the last run."""
    monkeypatch.setattr(torch.optim, "AdamW", _Recorder)
    _Recorder.made.clear()
    yield lambda: _Recorder.made[-1]
    _Recorder.made.clear()


def _run(student: Program, teacher: Program, task: Task, settings: Settings) -> tuple[Program, list[Update]]:
    steps: list[Update] = []
    return distil(student, teacher, task, settings, on_step=steps.append), steps


@pytest.fixture(scope="module")
def trained(student: Program, teacher: Program, task: Task, settings: Settings) -> tuple[Program, list[Update]]:
    return _run(student, teacher, task, settings.having({"epochs": 30}))


# ---- what is learnt ------------------------------------------------------------------------------------------------


def test_the_loss_falls(trained: tuple[Program, list[Update]]) -> None:
    """Mean relative error of the last five trajectories against the first five; chance differs by far less."""
    errors = [step.relative_error for step in trained[1]]
    assert sum(errors[-20:]) < 0.8 * sum(errors[:20])


def test_the_trained_program_is_nearer_on_trajectories_that_it_never_saw(
    trained: tuple[Program, list[Update]],
    student: Program,
    teacher: Program,
    task: Task,
    settings: Settings,
) -> None:
    still = {"lr_lora": 1e-12, "lr_weight_scale": 1e-12, "lr_activation_scale": 1e-12, "seed": 777, "epochs": 5}
    before, after = (
        sum(s.relative_error for s in _run(p, teacher, task, settings.having(still))[1]) for p in (student, trained[0])
    )
    assert after < 0.9 * before


def test_records_are_complete(trained: tuple[Program, list[Update]], task: Task) -> None:
    steps = trained[1]
    assert [s.step for s in steps] == list(range(1, 121))
    assert {s.total for s in steps} == {120}
    assert [s.epoch for s in steps] == [i // 4 for i in range(120)]
    assert [s.timestep for s in steps[:4]] == [75.0, 50.0, 25.0, 0.0]
    assert all(s.seconds > 0 for s in steps)


def test_only_the_trainable_tensors_change_and_all_of_them_do(
    trained: tuple[Program, list[Update]], student: Program
) -> None:
    result, names = trained[0], set(trained_tensors(student))
    assert names == {
        f"{site}.{leaf}"
        for site in ("token", "middle")
        for leaf in ("lora_a", "lora_b", "weight_scale", "activation_scale_table")
    }
    assert result.state.keys() == student.state.keys()
    changed = {name for name in student.state if not torch.equal(result.state[name], student.state[name])}
    assert changed == names
    assert result.stage == Stage.TRAINED
    assert not any(tensor.requires_grad for tensor in result.state.values())


def test_every_row_of_the_activation_tables_is_trained(trained: tuple[Program, list[Update]], student: Program) -> None:
    name = "middle.activation_scale_table"
    assert bool((trained[0].state[name] != student.state[name]).all())


def test_the_programs_given_stay_as_they_were(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    before = zoo.fingerprint(student), zoo.fingerprint(teacher)
    _run(student, teacher, task, settings)
    assert (zoo.fingerprint(student), zoo.fingerprint(teacher)) == before
    assert not any(tensor.requires_grad for p in (student, teacher) for tensor in p.state.values())


def test_scales_stay_positive_at_any_rate(student: Program, teacher: Program, task: Task, settings: Settings) -> None:
    """A rate that throws the scales below zero in a step: they stop at the smallest positive one."""
    rates = {"lr_weight_scale": 1.0, "lr_activation_scale": 10.0, "steps": 3}
    try:
        result, _ = _run(student, teacher, task, settings.having(rates))
    except TrainingError as error:  # a scale of 1e-8 may blow up its own gradient, which is then said
        pytest.fail(str(error))
    scales = [result.state[name] for name, kind in trained_tensors(student).items() if "lora" not in kind.pattern]
    assert min(float(scale.min()) for scale in scales) > 0
    assert min(float(scale.min()) for scale in scales) == pytest.approx(1e-8)


# ---- one step, computed independently ------------------------------------------------------------------------------


def _one_step_by_hand(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, relative error and gradients of the first step: both halves of guidance called by themselves."""
    noise, conditions = start(task, settings.batch_size, generator(settings.seed, 0, 0))
    assert conditions is not None
    time, g = torch.full((settings.batch_size,), 75.0), settings.guidance_scale
    module, parameters = student.module(), {}
    for name in trained_tensors(student):
        parameters[name] = module.get_parameter(name).requires_grad_(True)
    null, wanted = (teacher.module()(noise, time, condition) for condition in conditions)
    target = (1 - g) * null + g * wanted
    null, wanted = (module(noise, time, condition) for condition in conditions)
    loss = torch.square((1 - g) * null + g * wanted - target).sum()
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    loss = loss.detach()
    for tensor in student.state.values():
        tensor.requires_grad_(False)
    return float(loss), float(loss / target.square().sum()), dict(zip(parameters, gradients, strict=True))


def test_the_loss_is_the_summed_square_of_the_guided_noises(
    student: Program, teacher: Program, task: Task, settings: Settings, recorder: Callable[[], _Recorder]
) -> None:
    one = settings.having({"steps": 1})
    _, (record,) = _run(student, teacher, task, one)
    loss, relative, gradients = _one_step_by_hand(student, teacher, task, one)
    # Batches of 4 and of 8 may round a matrix product differently, and a code may flip for it.
    assert record.loss == pytest.approx(loss, rel=1e-3)
    assert record.relative_error == pytest.approx(relative, rel=1e-3)
    assert record.loss > 0
    for name, wanted in gradients.items():
        found = recorder().gradients[0][name]
        assert found is not None, name
        error = float((found - wanted).norm())
        assert error <= 1e-2 * float(wanted.norm()) + 1e-9, name


def test_every_trainable_tensor_has_a_gradient(
    student: Program, teacher: Program, task: Task, settings: Settings, recorder: Callable[[], _Recorder]
) -> None:
    _run(student, teacher, task, settings)
    second = recorder().gradients[1]
    assert second.keys() == trained_tensors(student).keys()
    for name, gradient in second.items():
        assert gradient is not None, name
        assert float(gradient.abs().max()) > 0, name


# ---- rates and decay -----------------------------------------------------------------------------------------------


def test_rates_are_scale_aware_and_decay_linearly(
    student: Program, teacher: Program, task: Task, settings: Settings, recorder: Callable[[], _Recorder]
) -> None:
    _run(student, teacher, task, settings)
    rates, total = recorder().rates, settings.total_steps
    assert len(rates) == total == 12
    for site in ("token", "middle"):
        base = settings.lr_lora * float(student.state[f"{site}.weight_scale"].mean())
        for k, rate in enumerate(rates):
            left = 1 - k / total
            assert rate[f"{site}.lora_a"] == rate[f"{site}.lora_b"] == pytest.approx(base * left)
            assert rate[f"{site}.weight_scale"] == pytest.approx(settings.lr_weight_scale * left)
            assert rate[f"{site}.activation_scale_table"] == pytest.approx(settings.lr_activation_scale * left)
    assert rates[0]["token.lora_a"] != pytest.approx(rates[0]["middle.lora_a"], rel=1e-3)


def test_the_first_step_of_adamw_moves_by_the_rate(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    """AdamW's first update is rate·sign(gradient), so a scale moves by its own rate, decay or no decay."""
    heavy = settings.having({"steps": 1, "weight_decay": 10.0})
    result, _ = _run(student, teacher, task, heavy)
    gradients = _one_step_by_hand(student, teacher, task, heavy)[2]
    name = "middle.weight_scale"
    moved, gradient = result.state[name] - student.state[name], gradients[name]
    clear = gradient.abs() > 1e-2 * gradient.abs().max()
    assert int(clear.sum()) > 16
    # 1e-5 added to a float32 scale of order 0.01 is known to about 1e-4 of itself.
    wanted = -settings.lr_weight_scale * gradient.sign()
    torch.testing.assert_close(moved[clear], wanted[clear], rtol=1e-2, atol=0)


def test_weight_decay_touches_lora_and_not_the_scales(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    one = settings.having({"steps": 1})
    none, heavy = (_run(student, teacher, task, one.having({"weight_decay": decay}))[0].state for decay in (0.0, 10.0))
    for name, kind in trained_tensors(student).items():
        if "lora" not in kind.pattern:
            assert torch.equal(none[name], heavy[name]), name
    assert not torch.equal(none["middle.lora_a"], heavy["middle.lora_a"])


# ---- random numbers and samplers -----------------------------------------------------------------------------------


def test_the_global_generator_is_neither_read_nor_moved(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    short, results = settings.having({"steps": 3, "eta": 0.5}), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        results.append(_run(student, teacher, task, short)[1])
        assert torch.equal(torch.get_rng_state(), before)
    assert [s.loss for s in results[0]] == [s.loss for s in results[1]]
    other = _run(student, teacher, task, short.having({"seed": 1}))[1]
    assert other[0].loss != results[0][0].loss


def test_every_epoch_draws_anew(student: Program, teacher: Program, task: Task, settings: Settings) -> None:
    draws = [start(task, 4, generator(settings.seed, epoch, 0))[0] for epoch in range(3)]
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[1], draws[2])
    numbers = itertools.product(range(3), range(5), range(21))
    assert len({generator(*three).initial_seed() for three in numbers}) == 3 * 5 * 21


def test_every_step_of_the_sampler_has_noise_of_its_own(
    student: Program, teacher: Program, task: Task, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds, real = [], trajectories.advance

    def spy(*args: Any) -> Tensor:
        seeds.append(args[-1].initial_seed())
        return real(*args)

    monkeypatch.setattr(trajectories, "advance", spy)
    _run(student, teacher, task, settings)
    assert len(seeds) == len(set(seeds)) == 12


@pytest.mark.parametrize("kind", [DDIMScheduler, EulerDiscreteScheduler, DPMSolverMultistepScheduler])
def test_a_second_epoch_starts_the_sampler_afresh(
    student: Program, teacher: Program, settings: Settings, kind: Any
) -> None:
    """Samplers with a counter or a history: the teacher's trajectory of epoch 1 is the one it would sample alone."""
    made, seen = task_with(kind), []
    module = teacher.module()

    class _Spy(torch.nn.Module):
        def forward(self, sample: Tensor, times: Tensor, condition: Tensor) -> Tensor:
            seen.append(sample[: len(sample) // 2].clone())
            return module(sample, times, condition)  # type: ignore[no-any-return]

    spied = teacher.evolve()
    object.__setattr__(spied, "module", _Spy)
    two = settings.having({"steps": 8, "lr_lora": 1e-9})
    _run(student, spied, made, two)
    scheduler = made.new_scheduler()
    scheduler.set_timesteps(4)
    noise, conditions = start(made, 4, generator(settings.seed, 1, 0))
    x = noise * scheduler.init_noise_sigma
    for index, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        assert torch.equal(seen[4 + index], model_input), f"step {index} of epoch 1"
        null, wanted = module(
            torch.cat([model_input] * 2),
            torch.full((8,), float(t)),
            torch.cat(conditions),  # type: ignore[arg-type]
        ).chunk(2)
        x = scheduler.step(null + 1.5 * (wanted - null), t, x).prev_sample


# ---- refusals ------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_not_finite_is_named_with_the_step(
    student: Program, teacher: Program, task: Task, settings: Settings
) -> None:
    broken = dict(teacher.state)
    name = next(name for name in broken if name.endswith("conv_out.bias"))
    broken[name] = torch.full_like(broken[name], float("nan"))
    with pytest.raises(TrainingError, match=r"step 1 of 4 .*: the denoiser gives NaN or infinity"):
        _run(student, teacher.evolve(state=broken), task, settings)


def test_a_rate_that_diverges_is_reported(student: Program, teacher: Program, task: Task, settings: Settings) -> None:
    with pytest.raises(TrainingError, match=r"training step \d+: the loss is (nan|inf)\. Lower"):
        _run(student, teacher, task, settings.having({"lr_lora": 1e38}))
