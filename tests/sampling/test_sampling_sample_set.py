"""Sample sets: what is in them, evenly over the timesteps, the same again for the same seed."""

import pytest
import torch
from torch import Tensor, nn

from hqc.capture import capture_module
from hqc.errors import TrainingError
from hqc.program import InputSpec, Program
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.sampling.sample_set import SampleSet, collect_samples, set_size
from hqc.sampling.task import Denoise, trajectory


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        return self.conv(sample) + timestep.view(-1, 1, 1, 1) / 1000 + condition.mean((1, 2)).view(-1, 1, 1, 1)


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    inputs = (InputSpec("sample", ("N", 2, 4, 4)), InputSpec("timestep", ("N",)), InputSpec("condition", ("N", 3, 4)))
    return capture_module(Denoiser(), inputs)


def work_of(program: Program, guidance: float = 1.5) -> Work:
    return Work(program, synthetic_task(program), Sampler(10, guidance))


def collected(work: Work, images: int = 3, timesteps: int = 4, seed: int = 5) -> SampleSet:
    return collect_samples(work, images, timesteps, seed, "collecting")


def test_it_is_spread_evenly_over_the_timesteps(program: Program) -> None:
    work = work_of(program)
    found = collected(work)
    halves = work.halves()
    assert len(found) == set_size(work, 3, 4) == 3 * 4 * halves
    times = [float(t) for t in work.sampled.scheduler(10).timesteps]
    assert [float(t) for t in found.inputs[1][:: 3 * halves]] == [times[0], times[3], times[6], times[9]]


def test_it_is_what_the_float_model_is_run_on(program: Program) -> None:
    """Against the trajectory itself: x_t of every image, and both halves of guidance as samples of their own."""
    work = work_of(program)
    seen: list[tuple[Tensor, ...]] = []

    def watch(sample: Tensor, timestep: Tensor, *conditions: Tensor) -> Tensor:
        seen.append((sample, timestep, *conditions))
        return program.module()(sample, timestep, *conditions)

    list(trajectory(work.sampled, watch, 3, 10, 1.5, 0.0, 5))
    wanted = [torch.cat([seen[step][i] for step in (0, 3, 6, 9)]) for i in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(collected(work).inputs, wanted, strict=True))


def test_without_guidance_there_is_one_half(program: Program) -> None:
    work = work_of(program, guidance=1.0)
    assert len(collected(work)) == set_size(work, 3, 4) == 12


def test_the_seed_decides(program: Program) -> None:
    work = work_of(program)
    assert torch.equal(collected(work).inputs[0], collected(work).inputs[0])
    assert not torch.equal(collected(work).inputs[0], collected(work, seed=6).inputs[0])


def test_more_timesteps_than_steps_are_all_of_them(program: Program) -> None:
    work = work_of(program)
    assert len(collected(work, timesteps=1000)) == set_size(work, 3, 1000) == 3 * 10 * work.halves()


def test_a_forward_loop_is_what_it_runs(program: Program) -> None:
    def loop(denoise: Denoise) -> None:
        for t in (7.0, 3.0, 3.0, 1.0):
            denoise(torch.full((2, 2, 4, 4), t), torch.tensor(t), torch.zeros(2, 3, 4))

    found = collected(Work(program, observe=loop), images=2, timesteps=2)
    assert found.inputs[1].tolist() == [7, 7, 1, 1]
    assert found.inputs[0][:, 0, 0, 0].tolist() == [7, 7, 1, 1]


def test_both_halves_of_a_guided_loop_are_taken(program: Program) -> None:
    """A batch of null and wanted conditions, twice as large as what is kept."""

    def loop(denoise: Denoise) -> None:
        halves = torch.cat([torch.zeros(4, 3, 4), torch.ones(4, 3, 4)])
        denoise(torch.zeros(8, 2, 4, 4), torch.tensor(5.0), halves)

    found = collected(Work(program, observe=loop), images=4, timesteps=2)
    assert found.inputs[2][:, 0, 0].tolist() == [0, 0, 1, 1]


def test_a_loop_that_runs_nothing_is_refused(program: Program) -> None:
    with pytest.raises(TrainingError, match="the forward loop never called the model"):
        collected(Work(program, observe=lambda denoise: None))


def test_nan_is_refused(program: Program) -> None:
    def loop(denoise: Denoise) -> None:
        denoise(torch.full((1, 2, 4, 4), torch.nan), torch.tensor(7.0), torch.zeros(1, 3, 4))

    with pytest.raises(TrainingError, match="is given NaN or infinity at timestep 7"):
        collected(Work(program, observe=loop))


def test_chunks_are_the_rows_in_order(program: Program) -> None:
    found = collected(work_of(program))
    chunks = list(found.chunks(5))
    assert [len(chunk[0]) for chunk in chunks][:-1] == [5] * (len(chunks) - 1)
    assert torch.equal(torch.cat([chunk[1] for chunk in chunks]), found.inputs[1])
