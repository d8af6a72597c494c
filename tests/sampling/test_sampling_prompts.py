"""Prompts as conditions: against what diffusers' own pipelines give their UNet, from folders, and what is refused."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline
import torch
from denoisers import TOKENS, captured_denoiser, denoiser
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from text_pipelines import TEXT_PIPELINES, save_text_pipeline, text_pipeline
from torch import Tensor, nn

from hqc import api, memory
from hqc.capture import trace
from hqc.capture.diffusers_models import denoiser_source
from hqc.errors import ArtefactError, MemoryShortError, TrainingError
from hqc.program import Program
from hqc.runtimes import text_encoder
from hqc.sampling import prompt_encoding
from hqc.sampling.prompts import prompt_task, read_prompts
from hqc.sampling.sources import conditions_of
from hqc.sampling.task import Task, trajectory
from hqc.sampling.task import denoiser as as_denoise

PROMPTS = ("a cat", "b", "42", "c a t s")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_text_pipeline(name, tmp_path_factory.mktemp(name)) for name in TEXT_PIPELINES}


def traced(name: str, folder: Path) -> Program:
    """The captured denoiser with the origin that `trace` of its pipeline gives."""
    program = captured_denoiser(name)
    return program.evolve(origin=denoiser_source(denoiser(name), "x", TOKENS, None, folder).origin)


def by_name(program: Program, conditions: Any) -> dict[str, Tensor]:
    names = [spec.name for spec in conditions_of(program.inputs)]
    return dict(zip(names, conditions if isinstance(conditions, tuple) else (conditions,), strict=True))


def given_by_diffusers(name: str, folder: Path, prompt: str, work: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(null, wanted) that the whole pipeline gives its UNet, as hqc names them."""
    pipeline, seen = text_pipeline(name, work), dict[str, Tensor]()

    def record(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        added = options.get("added_cond_kwargs") or {}
        seen.update({"condition": options["encoder_hidden_states"], **added})

    pipeline.unet.register_forward_pre_hook(record, with_kwargs=True)
    size = 8 * pipeline.vae_scale_factor
    pipeline(prompt, num_inference_steps=1, guidance_scale=3.0, height=size, width=size, output_type="latent")
    halves = {key: value.chunk(2) for key, value in seen.items()}
    return {key: null for key, (null, _) in halves.items()}, {key: wanted for key, (_, wanted) in halves.items()}


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_conditions_are_those_that_diffusers_gives_its_unet(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    program = traced(name, folders[name])
    task = api.task_of(program, prompts=["a cat"])
    null, wanted = given_by_diffusers(name, folders[name], "a cat", tmp_path)
    drawn = by_name(program, task.draw_conditions(2, torch.Generator()))
    nothing = by_name(program, task.unconditional(2))
    assert drawn.keys() == nothing.keys() == wanted.keys()
    for key in wanted:
        # The same weights and the same operators, in batches of another size.
        torch.testing.assert_close(drawn[key], wanted[key].expand_as(drawn[key]), rtol=0, atol=1e-6)
        torch.testing.assert_close(nothing[key], null[key].expand_as(nothing[key]), rtol=0, atol=1e-6)
    assert not torch.equal(drawn["condition"], nothing["condition"])
    if name == "sdxl":
        assert drawn["time_ids"][0].tolist() == [16, 16, 0, 0, 16, 16]  # latents of 8 and a VAE of two levels
        assert not nothing["condition"].any()  # force_zeros_for_empty_prompt


@pytest.mark.parametrize("g", [0.0, 0.5, 1.0, 7.5])
def test_calibration_samples_as_the_pipeline_does(g: float, folders: dict[str, Path], tmp_path: Path) -> None:
    """Every x_t is the pipeline's own at any guidance scale: up to 1 it runs the prompt's half alone."""
    program, pipeline, seen = traced("sd15", folders["sd15"]), text_pipeline("sd15", tmp_path), list[Tensor]()
    task = api.task_of(program, prompts=["a cat"])
    found = list(trajectory(task, as_denoise(program.module()), 1, 3, g, 0.0, 3))
    pipeline.set_progress_bar_config(disable=True)
    pipeline(
        "a cat",
        num_inference_steps=3,
        guidance_scale=g,
        latents=found[0].clone(),
        output_type="latent",
        callback_on_step_end=lambda _, i, t, kept: seen.append(kept["latents"].clone()) or kept,
    )
    for mine, wanted in zip(found[1:], seen, strict=False):
        torch.testing.assert_close(mine, wanted, rtol=0, atol=1e-4)


def test_the_empty_prompt_is_encoded_where_the_pipeline_says_so(folders: dict[str, Path], tmp_path: Path) -> None:
    program, pipeline = traced("sdxl", folders["sdxl"]), text_pipeline("sdxl", tmp_path)
    pipeline.register_to_config(force_zeros_for_empty_prompt=False)
    with torch.no_grad():
        wanted, _, pooled, _ = pipeline.encode_prompt("", device="cpu", do_classifier_free_guidance=False)
    nothing = by_name(program, prompt_task(pipeline, program, PROMPTS).unconditional(3))
    torch.testing.assert_close(nothing["condition"], wanted.expand(3, -1, -1), rtol=0, atol=1e-6)
    torch.testing.assert_close(nothing["text_embeds"], pooled.expand(3, -1), rtol=0, atol=1e-6)
    assert nothing["text_embeds"].any()


def test_every_prompt_is_drawn_before_any_comes_again(folders: dict[str, Path], monkeypatch: Any) -> None:
    program = traced("sd15", folders["sd15"])
    whole = api.task_of(program, prompts=PROMPTS)
    monkeypatch.setattr(prompt_encoding, "_PROMPTS_AT_ONCE", 3)  # the last piece is smaller
    task = api.task_of(program, prompts=PROMPTS)
    each = [api.task_of(program, prompts=[p]).draw_conditions(1, torch.Generator())[0] for p in PROMPTS]

    def numbers(n: int, seed: int) -> list[int]:
        drawn = task.draw_conditions(n, torch.Generator().manual_seed(seed))
        distances = torch.stack([(drawn - one).abs().amax((1, 2)) for one in each])
        assert float(distances.amin(0).max()) < 1e-5 < 1e-2 < float(distances.max())
        return distances.argmin(0).tolist()

    found = numbers(10, 0)
    assert sorted(found[:4]) == sorted(found[4:8]) == [0, 1, 2, 3]
    assert len(set(found[8:])) == 2
    assert found == numbers(10, 0)
    assert any(found != numbers(10, seed) for seed in (1, 2))
    # Pieces or not: the same rows.
    a, b = (t.draw_conditions(4, torch.Generator().manual_seed(0)) for t in (task, whole))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_the_text_encoder_is_freed(name: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[weakref.ref[nn.Module]] = []

    def load(folder: Path) -> Any:
        pipeline = text_encoder.load_text_pipeline(folder)
        kept.extend(weakref.ref(m) for m in pipeline.components.values() if isinstance(m, nn.Module))
        return pipeline

    monkeypatch.setattr(api, "load_text_pipeline", load)
    task = api.task_of(traced(name, folders[name]), prompts=PROMPTS)
    gc.collect()
    assert [ref() for ref in kept] == [None] * (2 if name == "sdxl" else 1)
    assert task.draw_conditions is not None


@pytest.mark.parametrize("name", TEXT_PIPELINES)
def test_prompts_are_sampled(name: str, folders: dict[str, Path]) -> None:
    program = traced(name, folders[name])
    task = api.task_of(program, prompts=PROMPTS)
    assert isinstance(task.new_scheduler(), DDIMScheduler)
    assert task.new_scheduler().config.num_train_timesteps == 100
    steps = list(trajectory(task, as_denoise(program.module()), 2, 3, 3.0, 0.0, 0))
    assert all(torch.isfinite(x).all() and x.shape == (2, 4, 8, 8) for x in steps)
    noise = api.task_of(program, synthetic=True)
    other = list(trajectory(noise, as_denoise(program.module()), 2, 3, 3.0, 0.0, 0))
    assert not torch.allclose(steps[-1], other[-1], rtol=0, atol=1e-3)


def test_a_task_says_what_it_draws_from(folders: dict[str, Path]) -> None:
    program = traced("sd15", folders["sd15"])

    def said(*prompts: str) -> str:
        return api.task_of(program, prompts=prompts).drawn_from

    assert said("a", "b").startswith("2 prompts (sha256 ")
    assert said("a").startswith("1 prompt (sha256 ")
    assert said("a", "b") == said("a", "b") != said("b", "a")
    assert said("a", "b c d", "b c d e").endswith("), 1 of them longer than the tokenizer takes and cut")
    assert api.task_of(program, synthetic=True).drawn_from == "noise and random conditions, not real ones"


def test_libraries_are_as_loud_as_before(folders: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    before = [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)]
    assert before[0][1]
    api.task_of(traced("sd15", folders["sd15"]), prompts=["a b c d e f g h"])
    assert capfd.readouterr() == ("", "")
    assert [(log.get_verbosity(), log.is_progress_bar_enabled()) for log in (diffusers_log, transformers_log)] == before


# ---- the file ------------------------------------------------------------------------------------------------------


def test_lines_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbfa cat \r\n\r\n \t\n  Z\xc3\xbcrich at night\x0b\xe2\x80\xa8again\rthe end")
    # Only line ends divide prompts: a vertical tab and U+2028 are white space inside one.
    assert read_prompts(path) == ("a cat", "Zürich at night\x0b\u2028again", "the end")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"holds no prompt\. Write one prompt a line\."),
        (b" \n\t\r\n", "holds no prompt"),
        (b"\xef\xbb\xbf", "holds no prompt"),
        (b"a cat\ncaf\xe9\n", r"is no UTF-8 text \(byte 9 is 0xe9\)\. Save it as UTF-8\."),
        (b"\xef\xbb\xbfa" + b"b" * 64 * 2**20, r"is larger than 64 MiB\. Give a part of it"),
        ("a cat\n".encode("utf-16"), r"is no UTF-8 text \(byte 0 is 0xff\)"),
    ],
    ids=["empty", "blank", "mark", "latin-1", "large", "utf-16"],
)
def test_files_without_prompts(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    with pytest.raises(TrainingError, match=said) as caught:
        read_prompts(path)
    assert caught.value.where == str(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"none\.txt: cannot be read"):
        read_prompts(tmp_path / "none.txt")
    with pytest.raises(TrainingError, match="cannot be read"):
        read_prompts(tmp_path)


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dit", "labelled"])
def test_denoisers_with_other_conditions_are_refused(name: str) -> None:
    with pytest.raises(TrainingError, match=f"program from {name}: takes class_labels; prompts give condition, text"):
        api.task_of(captured_denoiser(name), prompts=PROMPTS)


def test_prompts_and_noise_exclude_each_other() -> None:
    with pytest.raises(TrainingError, match="--prompts: and --synthetic exclude each other"):
        api.task_of(captured_denoiser("sd15"), prompts=PROMPTS, synthetic=True)


def test_no_prompts_at_all(folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="prompts: there are none"):
        prompt_task(text_pipeline("sd15", tmp_path), captured_denoiser("sd15"), ())


def test_a_program_without_pipeline_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"was not traced from a pipeline.*Give --synthetic instead of --prompts"):
        api.task_of(captured_denoiser("sd15"), prompts=PROMPTS)


def test_a_pipeline_without_text_encoder_is_refused() -> None:
    program = tiny_pipeline.traced_pipeline("classes")
    with pytest.raises(TrainingError, match="the ClassConditionalLDMPipeline has no text encoder"):
        api.task_of(program, prompts=PROMPTS)
    with pytest.raises(TrainingError, match="ClassConditionalLDMPipeline: has no text encoder"):
        api.task_of(program, tiny_pipeline.tiny_pipeline(), prompts=PROMPTS)


def test_an_encoder_of_another_width_or_length_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline, sdxl = text_pipeline("sd15", tmp_path), traced("sdxl", folders["sdxl"])
    with pytest.raises(
        TrainingError, match=r"text_embeds: StableDiffusionPipeline does not encode it; .* takes \[32\]"
    ):
        api.task_of(sdxl, pipeline, prompts=PROMPTS)
    longer = trace(denoiser_source(denoiser("sd15"), "x", 7, None, folders["sd15"]))
    with pytest.raises(TrainingError) as caught:
        api.task_of(longer, prompts=PROMPTS)
    assert str(caught.value) == (
        "condition: StableDiffusionPipeline encodes a prompt into [5, 32]; the denoiser takes [7, 32]. "
        "Trace it with --condition-length 5."
    )
    wide = text_pipeline("sdxl", tmp_path / "xl")
    wide.text_encoder = None
    wide.tokenizer = None
    with pytest.raises(
        TrainingError, match=r"encodes a prompt into \[5, 16\]; the denoiser takes \[5, 32\]\. Give the"
    ):
        api.task_of(sdxl, wide, prompts=PROMPTS)


def copied(folder: Path, target: Path) -> Path:
    from hqc.storage import copy_pipeline

    copy_pipeline(folder, target)
    return target


def test_weights_are_read_from_safetensors_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd15"], tmp_path / "p")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.rename(weights.with_name("pytorch_model.bin"))
    with pytest.raises(ArtefactError, match=r"its text encoder cannot be loaded .*safetensors"):
        api.task_of(traced("sd15", folder), prompts=PROMPTS)


def test_weights_that_a_file_lacks_are_not_made_up(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd15"], tmp_path / "p")
    path = folder / "text_encoder" / "model.safetensors"
    weights = load_file(path)
    gone = next(name for name in sorted(weights) if name.endswith("q_proj.weight"))
    del weights[gone]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ArtefactError, match=r"text_encoder: lacks 1 of the text encoder's weights: .*q_proj\.weight"):
        api.task_of(traced("sd15", folder), prompts=PROMPTS)


def test_half_precision_is_encoded_in_float32(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd15"], tmp_path / "p")
    path = folder / "text_encoder" / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    config = json.loads((path.parent / "config.json").read_text())
    (path.parent / "config.json").write_text(json.dumps(config | {"dtype": "float16"}))
    halves, full = (
        api.task_of(traced("sd15", place), prompts=["a cat"]).draw_conditions(1, torch.Generator())
        for place in (folder, folders["sd15"])
    )
    assert halves.dtype == torch.float32
    # Weights rounded to 11 bits through three layers of width 32.
    assert 1e-6 < float((halves - full).norm() / full.norm()) < 1e-2


@pytest.mark.parametrize("part", [["mine", "Encoder"], ["transformers", "AutoModel"]], ids=["module", "auto_map"])
def test_code_in_the_folder_is_not_run(part: list[str], folders: dict[str, Path], tmp_path: Path) -> None:
    folder, mark = copied(folders["sd15"], tmp_path / "p"), tmp_path / "ran"
    (folder / "text_encoder" / "mine.py").write_text(f"open({str(mark)!r}, 'w')\nclass Encoder: pass\n")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"text_encoder": part}))
    config = json.loads((folder / "text_encoder" / "config.json").read_text())
    auto = {"auto_map": {"AutoModel": "mine.Encoder"}}
    (folder / "text_encoder" / "config.json").write_text(json.dumps(config | auto))
    with pytest.raises(
        ArtefactError, match=r"its text_encoder is .*\.(Encoder|AutoModel); hqc runs those of transformers"
    ):
        api.task_of(traced("sd15", folder), prompts=PROMPTS)
    assert not mark.exists()


def test_a_damaged_tokenizer_is_said(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(folders["sd15"], tmp_path / "p")
    (folder / "tokenizer" / "tokenizer.json").write_text("{")
    with pytest.raises(ArtefactError, match="its text encoder cannot be loaded"):
        api.task_of(traced("sd15", folder), prompts=PROMPTS)
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(ArtefactError, match=r"config\.json: gives no block_out_channels"):
        text_encoder._vae_scale_factor(folder, 8)


def test_too_little_memory_is_said_before_it_is_loaded(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    encoder = text_pipeline("sd15", tmp_path).text_encoder
    wanted = 4 * sum(parameter.numel() for parameter in encoder.parameters())
    monkeypatch.setattr(memory, "available_bytes", lambda: wanted - 1)
    with pytest.raises(MemoryShortError, match=r"loading the text encoders of .*: needs about"):
        text_encoder.load_text_pipeline(folders["sd15"])
    monkeypatch.setattr(memory, "available_bytes", lambda: wanted)
    pipeline = text_encoder.load_text_pipeline(folders["sd15"])
    monkeypatch.setattr(memory, "available_bytes", lambda: 3 * 2 * 4 * 5 * 32 - 1)
    with pytest.raises(MemoryShortError, match=r"encoding 3 prompts: needs about 3\.8 kB .* Give fewer prompts"):
        prompt_task(pipeline, captured_denoiser("sd15"), PROMPTS[:3])
    assert prompt_task(pipeline, captured_denoiser("sd15"), PROMPTS[:2]).draw_conditions is not None


def test_tasks_are_told_apart_when_a_run_is_resumed(folders: dict[str, Path], tmp_path: Path) -> None:
    """The same program, recipe and seeds, and other prompts: another run."""
    program = traced("sd15", folders["sd15"])
    settings = {"distil.updates": 1, "distil.batch_size": 1, "sampler.num_inference_steps": 2}

    def run(task: Task, resume: bool) -> Program:
        return api.qat(program, "hq-dm", "w4a4", task=task, settings=settings, work_dir=tmp_path, resume=resume)

    first = run(api.task_of(program, prompts=PROMPTS), False)
    assert first.plan.training["conditions"].startswith("4 prompts (sha256 ")
    with pytest.raises(ArtefactError, match=r"conditions was '4 prompts .*', now '1 prompt "):
        run(api.task_of(program, prompts=PROMPTS[:1]), True)
