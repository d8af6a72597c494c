"""Every public function takes a path as text or as a path object: by its signature, and by calling it."""

import inspect
import os
import types
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiny_pipeline

import hqc
from hqc.evaluation import grid
from hqc.models.classifier import load_digit_classifier
from hqc.sampling.prompts import read_prompts

MODULES = (
    "hqc",
    "hqc.api",
    "hqc.capture",
    "hqc.engines",
    "hqc.evaluation.grid",
    "hqc.evaluation.metrics",
    "hqc.evaluation.report",
    "hqc.evaluation.sampling",
    "hqc.export",
    "hqc.models.classifier",
    "hqc.plugins",
    "hqc.runtimes",
    "hqc.runtimes.ort_runtime",
    "hqc.training",
    "hqc.sampling.prompts",
)


def public() -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in MODULES:
        module = import_module(name)
        for public_name in module.__all__:
            found = getattr(module, public_name)
            if inspect.isfunction(found):
                yield f"{name}.{public_name}", found
            elif inspect.isclass(found) and public_name.endswith("Session") and public_name != "Session":
                yield f"{name}.{public_name}", found.__init__


def taken(hint: Any) -> set[Any]:
    """The types of a union, generic ones by their origin."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return {typing.get_origin(part) or part for part in (typing.get_args(hint) if union else (hint,))}


def test_signatures_that_take_a_path_take_text_too() -> None:
    seen, wrong = 0, []
    for name, function in public():
        for parameter, hint in typing.get_type_hints(function).items():
            found = taken(hint)
            if parameter == "return" or not found & {Path, os.PathLike}:
                continue
            seen += 1
            if not {str, os.PathLike} <= found:
                wrong.append(f"{name}({parameter}: {hint})")
    assert wrong == []
    assert seen >= 18


class PathObject:
    """A path that is neither text nor pathlib's."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_pipeline.save_tiny_pipeline(tmp_path_factory.mktemp("paths") / "pipeline")


@pytest.mark.parametrize("kind", [str, PathObject], ids=["text", "path object"])
def test_functions_take_them(source: Path, kind: Callable[[Path], Any], tmp_path: Path, samples: Any) -> None:
    program = hqc.trace(kind(source))
    assert program.origin.pipeline == str(source)
    program_folder, export = kind(tmp_path / "a.hqc"), kind(tmp_path / "onnx")
    hqc.save_program(program, program_folder, pipeline=kind(source))
    assert len(list(hqc.load_program(program_folder).sites())) == len(list(program.sites()))
    task = hqc.task_of(program, folder=kind(source))
    assert task.drawn_from == "the pipeline's conditions"

    report = hqc.export_program(program, "onnxruntime", export, pipeline=kind(source))
    assert report.folder == tmp_path / "onnx"
    model = hqc.load(export, cache=kind(tmp_path / "cache"))
    assert model.pipeline_folder == tmp_path / "onnx" / "pipeline"
    assert (tmp_path / "cache").is_dir()
    assert model.pipeline().unet.session.name == "onnxruntime"

    grid.save_grid(kind(tmp_path / "grid.png"), samples, model_name="x")
    assert (tmp_path / "grid.png").is_file()
    (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    assert read_prompts(kind(tmp_path / "prompts.txt")) == ("a cat",)
    weights = Path(hqc.__file__).parent / "models" / "digits" / "classifier" / "model.safetensors"
    assert load_digit_classifier(kind(weights)).training is False


@pytest.fixture
def samples() -> Any:
    import torch

    from hqc.evaluation.sampling import Samples, SamplingProtocol

    return Samples(torch.zeros(2, 1, 8, 8), None, (0, 1), (0, 1), SamplingProtocol("DDIM", 1, 1.0, 0.0))
