"""Every kind of pipeline behind the engine: the images of `sample_images`, whatever shares the calls; previews."""

import copy
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from captured_pipelines import captured_pipelines
from engine_images import drawn
from lora_files import layers_of, save_lora, tensors

import hqc
from hqc.evaluation.images import pixels_of
from hqc.evaluation.needs import denoiser_of, needs_of
from hqc.evaluation.previews import decoded
from hqc.evaluation.sampling import sample_images
from hqc.program import BATCH, InputSpec, Program
from hqc.runtimes.unet import SessionUNet
from hqc.serving.backend import Drawing, preview_steps
from hqc.serving.pipelines import PipelineBackend
from hqc.serving.rendezvous import PipelineSteps, together
from hqc.serving.split import Split
from hqc.serving.tickets import Call, Task

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*deprecated.*:FutureWarning"),
]
PROMPTS = ("a cat", "b")
KINDS = ("ddpm", "sd15", "flux", *(pytest.param(name, marks=pytest.mark.long) for name in ("dit", "sdxl")))


@pytest.fixture(scope="module")
def pipes(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return captured_pipelines(tmp_path_factory)


@pytest.fixture(scope="module")
def digits(few_digits: Program, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """`digits` on integer kernels."""
    folder = tmp_path_factory.mktemp("digits") / "onnx"
    hqc.export_program(few_digits, "onnxruntime", folder)
    return hqc.load(folder, threads=1).pipeline()


def drawing(needs: Any, seed: int, steps: int = 3, guidance: float = 2.5, **more: Any) -> Drawing:
    prompt = PROMPTS[seed % 2] if needs.kind == "prompt" else None
    label = seed % 2 if needs.kind == "class_label" else 0
    scale = guidance if needs.guides else 1.0
    return Drawing(label, prompt, "", seed, steps, scale, **more)


def sampled(pipe: Any, wanted: Drawing) -> Any:
    """The image that `hqc sample` draws, of the pipeline without an engine."""
    prompts = () if wanted.prompt is None else (wanted.prompt,)
    options = {"num_inference_steps": wanted.num_inference_steps, "guidance_scale": wanted.guidance_scale}
    samples = sample_images(pipe, [wanted.label], [wanted.seed], eta=0.0, batch_size=1, prompts=prompts, **options)
    return pixels_of(samples.images[0])


@pytest.mark.parametrize("name", KINDS)
def test_images_of_a_mix_are_those_of_the_pipeline_alone(name: str, pipes: Any) -> None:
    pipe = pipes(name)
    needs = needs_of(pipe)
    wanted = [drawing(needs, seed, steps=2 + seed % 3, guidance=[1.0, 2.5, 4.0][seed % 3]) for seed in range(6)]
    references = [sampled(pipe, each) for each in wanted]
    found, batches = drawn(PipelineBackend(copy.copy(pipe)), wanted)
    assert max(batches) == 4
    for image, reference in zip(found, references, strict=True):
        assert image.shape == reference.shape
        # Float convolutions round by the size of a batch: 1e-6 of a value, which may turn a pixel's rounding.
        assert np.abs(image.astype(int) - reference).max() <= 1
    assert any((found[0] != other).any() for other in found[1:] if other.shape == found[0].shape)


def test_the_last_task_is_the_decoder_of_the_image(pipes: Any) -> None:
    pipe = pipes("sd15")
    backend = PipelineBackend(copy.copy(pipe))
    seen: list[int] = []
    steps = backend.begin(drawing(needs_of(pipe), 1, steps=3, previews=2, see=lambda index, _: seen.append(index)))
    tasks: list[bool] = []
    output = None
    with backend.around(), suppress(StopIteration):
        while wanted := steps.send(output):
            tasks += [wanted.last] if isinstance(wanted, Task) else []
            output = wanted.run() if isinstance(wanted, Task) else backend.denoise([wanted])[0]
    assert seen == [0, 1]
    assert tasks == [False, False, False, True]  # the text encoder, two previews, the image


def test_engine_and_pipeline_draw_the_same_bits(digits: Any) -> None:
    wanted = Drawing(7, None, "", 11, 4, 1.5)
    (image,), _ = drawn(PipelineBackend(copy.copy(digits)), [wanted])
    np.testing.assert_array_equal(image, sampled(digits, wanted))


def test_steps_are_tried_while_no_image_has_torchs_generator(digits: Any) -> None:
    """Requests are checked in threads of the server, while the engine's gives the generator to its images in turns."""
    backend, inside, checked = PipelineBackend(copy.copy(digits)), threading.Event(), threading.Event()
    left = []

    def draw() -> None:
        inside.set()
        left.append(checked.wait(0.3))
        left.append(torch.rand(1))

    def check() -> None:
        assert inside.wait(20)
        assert backend.check_steps(4, "heun") is None
        checked.set()

    beside = threading.Thread(target=check)
    beside.start()
    with pytest.raises(StopIteration):
        PipelineSteps(draw, 5).send(None)
    beside.join()
    assert left == [False, torch.rand(1, generator=torch.Generator().manual_seed(5))]
    before = torch.get_rng_state()
    assert all(backend.check_steps(steps, "heun") is None for steps in (4, 5))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scheduler_that_draws_without_a_generator_is_the_images_own(pipes: Any) -> None:
    """Stochastic steps of diffusers' consistency models draw from torch's own generator where they get none."""

    def draw() -> torch.Tensor:
        first = torch.randn(2)
        torch.Tensor(getcurrent().parent.switch(Call({}, 1)))
        return torch.cat([first, torch.randn(2)])

    from greenlet import getcurrent

    def run(*seeds: int) -> list[torch.Tensor]:
        steps = [PipelineSteps(draw, seed) for seed in seeds]
        for each in steps:
            next(each)
        ends = []
        for each in steps:
            with pytest.raises(StopIteration) as end:
                each.send([0.0])
            ends.append(end.value.value)
        return ends

    before = torch.get_rng_state()
    alone, beside = run(3)[0], run(5, 3, 4)[1]
    assert bool((alone == beside).all())
    assert bool((torch.get_rng_state() == before).all())


def test_styles_of_requests_share_calls(captured: Callable[[str], Program], tmp_path: Path) -> None:
    """Every image has the scales that it asks for, and is equal to the bit to drawing it alone."""
    program = captured("digits")
    file = save_lora(tmp_path / "ink.safetensors", tensors(layers_of(program, seed=1), "bare"))
    few = {"calibrate_activations.samples": 2, "sampler.num_inference_steps": 2}
    quantised = hqc.attach_loras(hqc.ptq(program, "rtn", "w4a4", settings=few), [f"ink={file}"])
    hqc.export_program(quantised, "onnxruntime", tmp_path / "onnx")
    backend = PipelineBackend(hqc.load(tmp_path / "onnx", threads=1).pipeline())
    assert backend.loras == ("ink",)
    plain = Drawing(4, None, "", 3, 4, 1.5)
    wanted = [plain, *(replace(plain, loras=(("ink", scale),)) for scale in (0.0, 1.0, 0.4))]
    alone, _ = drawn(backend, wanted, max_batch=1)
    together, batches = drawn(backend, wanted, max_batch=4)
    assert max(batches) == 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(together[0], together[2])  # attached at 1
    assert (together[1] != together[2]).any()
    assert (together[3] != together[2]).any()


def test_previews_end_in_the_image(digits: Any) -> None:
    backend = PipelineBackend(copy.copy(digits))
    seen: list[tuple[int, Any]] = []
    wanted = Drawing(3, None, "", 5, 20, 1.5, previews=3, see=lambda index, image: seen.append((index, image)))
    (image,), _ = drawn(backend, [wanted])
    assert [index for index, _ in seen] == [0, 1, 2]
    errors = [np.abs(image.astype(float) - preview).mean() for _, preview in seen]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 10 < errors[0]
    (plain,), _ = drawn(backend, [replace(wanted, previews=0)])
    np.testing.assert_array_equal(image, plain)  # to look at it does not change it


@pytest.mark.parametrize("name", ["ddpm", "sd15", pytest.param("sdxl", marks=pytest.mark.long), "flux"])
def test_decoding_is_that_of_the_pipeline(name: str, pipes: Any) -> None:
    pipe = pipes(name)
    needs = needs_of(pipe)
    prompts = PROMPTS if needs.kind == "prompt" else ()
    options = {"num_inference_steps": 2, "guidance_scale": 1.0, "eta": 0.0, "batch_size": 2, "prompts": prompts}
    samples = sample_images(pipe, [0, 0], [5, 6], **options)
    if samples.latents is None:
        assert name == "ddpm"
        latents = samples.images * 2 - 1
    else:
        latents = samples.latents
    torch.testing.assert_close(decoded(pipe, latents, needs.size), samples.images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "dpmsolver++", "euler", "heun", "lms", "pndm", "unipc"])
def test_previews_of_every_scheduler_come_near_the_image(scheduler: str, digits: Any) -> None:
    backend = PipelineBackend(copy.copy(digits))
    seen: list[Any] = []
    look = {"previews": 3, "see": lambda _, image: seen.append(image)}
    (image,), _ = drawn(backend, [Drawing(3, None, "", 5, 24, 1.5, scheduler=scheduler, **look)])
    assert len(seen) == 3
    assert np.abs(image.astype(float) - seen[-1]).mean() < 12


@pytest.mark.parametrize("name", ["flux", "sd15", "consistency"])
def test_previews_where_a_scheduler_has_noise_levels(name: str, pipes: Any) -> None:
    backend = PipelineBackend(copy.copy(pipes(name)))
    assert backend.previews is (name != "consistency")
    seen: list[Any] = []
    wanted = drawing(backend.needs, 1, steps=4)
    if backend.previews:
        (image,), _ = drawn(backend, [replace(wanted, previews=1, see=lambda _, image: seen.append(image))])
        assert seen[0].shape == image.shape


def test_prompts_are_encoded_once(pipes: Any) -> None:
    pipe = copy.copy(pipes("sd15"))
    calls: list[Any] = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda *args, **options: calls.append(args) or encode(*args, **options)
    backend = PipelineBackend(pipe)
    drawn(backend, [drawing(backend.needs, seed) for seed in (0, 2, 1, 4)])
    assert len(calls) == 2


def test_inputs_without_a_batch_axis_part_the_calls() -> None:
    class Session:
        name = "torch"
        inputs = (
            InputSpec("sample", (BATCH, 1)),
            InputSpec("timestep", (BATCH,)),
            InputSpec("ids", (2,)),
        )

        def __init__(self) -> None:
            self.calls: list[Any] = []

        def __call__(self, sample: Any, timestep: Any, ids: Any) -> Any:
            self.calls.append((len(sample), ids.tolist()))
            return sample + timestep[:, None] + ids.sum()

    def call(value: float, rows: int, ids: list[float]) -> Call:
        sample = torch.full((rows, 1), value)
        return Call({"sample": sample, "timestep": torch.ones(rows), "ids": torch.tensor(ids)}, rows)

    session = Session()
    found = together(session, [call(1, 2, [0, 0]), call(2, 1, [0, 5]), call(3, 1, [0, 0])], Split())  # type: ignore[arg-type]
    assert session.calls == [(3, [0, 0]), (1, [0, 5])]
    assert [each.flatten().tolist() for each in found] == [[2, 2], [8], [4]]


def test_a_pipeline_stays_usable_outside_of_the_engine(digits: Any, tmp_path: Path) -> None:
    pipe = copy.copy(digits)
    wanted = Drawing(2, None, "", 1, 2, 1.5)
    before = sampled(pipe, wanted)
    PipelineBackend(pipe)
    assert isinstance(denoiser_of(pipe), SessionUNet)
    np.testing.assert_array_equal(sampled(pipe, wanted), before)


def test_steps_of_previews() -> None:
    assert preview_steps(20, 3) == [5, 10, 15]
    assert preview_steps(3, 3) == [1, 2]
    assert preview_steps(1, 3) == []
    assert preview_steps(50, 0) == []
