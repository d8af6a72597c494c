"""`--names optimum`: what the file calls its inputs and its output; every reader of an export takes either."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from denoisers import DENOISERS, captured_denoiser, source_of
from tiny_pipeline import saved_pipeline, traced_pipeline

from hqc.errors import ArtefactError, ExportError
from hqc.evaluation.bench.worker import RUNTIMES
from hqc.evaluation.export_errors import compare_export
from hqc.export import export_program
from hqc.export.interface import Interface, interface_for, interface_of, rename_ports
from hqc.export.reference import verification_inputs
from hqc.program import InputSpec
from hqc.runtimes import load
from hqc.storage import check_manifest

UNET, TRANSFORMER = ("sample", "out_sample"), ("hidden_states", "out_hidden_states")
FIRST = dict.fromkeys(("dit", "pixart", "pixart_512", "sd3", "flux"), TRANSFORMER)
AS_THEY_ARE = ("timestep", "text_embeds", "time_ids", "timestep_cond", "class_labels", "pooled_projections")


def ports(model: Path) -> tuple[list[str], list[str]]:
    graph = onnx.load(str(model), load_external_data=False).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_has_optimums_names(name: str) -> None:
    source = source_of(name)
    found = interface_for("optimum", source.inputs, source.origin.unet_config)
    first, output = FIRST.get(name, UNET)
    names = [found.name(spec.name) for spec in source.inputs]
    assert (names[0], found.output) == (first, output)
    assert ("encoder_hidden_states" in names) == any(spec.name == "condition" for spec in source.inputs)
    assert "condition" not in names
    assert {spec.name for spec in source.inputs} & set(AS_THEY_ARE) <= set(names)


def test_hqcs_names_are_the_usual_ones() -> None:
    assert interface_for("hqc", source_of("sd3").inputs, {}) == Interface({}, "output")


def test_a_denoiser_of_no_known_class_has_a_unets_names() -> None:
    inputs = (InputSpec("sample", ("N", 8)), InputSpec("timestep", ("N",)), InputSpec("mask", ("N", 8)))
    assert interface_for("optimum", inputs, {}) == Interface({}, "out_sample")


@pytest.mark.parametrize("other", ["encoder_hidden_states", "out_sample"])
def test_two_values_of_one_name_are_refused(other: str) -> None:
    inputs = tuple(InputSpec(name, ("N", 8)) for name in ("sample", "timestep", "condition", other))
    with pytest.raises(ExportError, match=f"names optimum: two values would be called {other}"):
        interface_for("optimum", inputs, {})


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="names 'onnx': unknown; there are hqc, optimum"):
        export_program(captured_denoiser("labelled"), "portable", tmp_path / "x", names="onnx")  # type: ignore[arg-type]
    with pytest.raises(ExportError, match="target tensorrt: has no names of optimum"):
        export_program(captured_denoiser("labelled"), "tensorrt", tmp_path / "x", names="optimum")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(("name", "target"), [("sdxl", "onnxruntime"), ("sd3", "portable")])
def test_an_export_runs_to_the_same_bits_under_either_names(name: str, target: str, tmp_path: Path) -> None:
    program = captured_denoiser(name)
    export_program(program, target, tmp_path / "ours")  # type: ignore[arg-type]
    export_program(program, target, tmp_path / "theirs", names="optimum", external_data_bytes=0)  # type: ignore[arg-type]
    interface = interface_for("optimum", program.inputs, program.origin.unet_config)
    assert ports(tmp_path / "theirs" / "model.onnx") == (
        [interface.name(spec.name) for spec in program.inputs],
        [interface.output],
    )
    assert (tmp_path / "theirs" / "model.onnx.data").is_file()
    manifest = check_manifest(tmp_path / "theirs", "hqc-export")
    assert interface_of(manifest, "x") == interface
    assert manifest["inputs"] == check_manifest(tmp_path / "ours", "hqc-export")["inputs"]
    config = json.loads((tmp_path / "theirs" / "config.json").read_text(encoding="utf-8"))
    assert config == json.loads(json.dumps(dict(program.origin.unet_config)))
    assert "config.json" in manifest["files"]
    assert not (tmp_path / "ours" / "config.json").exists()
    args = program.example_inputs(2, seed=9)
    ours, theirs = (load(tmp_path / folder).session for folder in ("ours", "theirs"))
    assert theirs.inputs == program.inputs
    assert torch.equal(theirs(*args), ours(*args))


def test_a_name_that_is_taken_inside_changes_places(tmp_path: Path) -> None:
    """Twice renamed is as it was."""
    program = captured_denoiser("labelled")
    export_program(program, "onnxruntime", tmp_path / "x")
    model, interface = tmp_path / "x" / "model.onnx", Interface({"sample": "hidden_states"}, "out_hidden_states")
    proto = onnx.load(str(model))
    inner = proto.graph.node[0].output[0]
    for node in proto.graph.node:
        for values in (node.input, node.output):
            values[:] = ["hidden_states" if name == inner else name for name in values]
    onnx.save(proto, str(model))
    before = model.read_bytes()
    rename_ports(model, interface)
    assert ports(model)[0][0] == "hidden_states"
    onnx.checker.check_model(str(model), full_check=True)
    assert model.read_bytes() != before
    rename_ports(model, interface)
    assert onnx.load(str(model)) == proto


@pytest.mark.parametrize(
    "names", [[], {"inputs": []}, {"inputs": {"sample": 3}}, {"output": ""}, {"inputs": {"a": ""}}]
)
def test_a_manifest_with_other_names_is_refused(names: object) -> None:
    with pytest.raises(ArtefactError, match="x: has a manifest whose names of inputs are none"):
        interface_of({"names": names}, "x")


def test_an_export_of_an_earlier_version_has_hqcs_names() -> None:
    assert interface_of({}, "x") == Interface()


# ---- who reads it --------------------------------------------------------------------------------------------------


def test_compare_measures_the_inputs_of_sites_too(exported, tmp_path: Path) -> None:
    program, folder, _ = exported("single_key", "w4a4", "onnxruntime")
    export_program(program, "onnxruntime", tmp_path / "x", names="optimum")
    before = (tmp_path / "x" / "model.onnx").read_bytes()
    args = verification_inputs(program, 2)
    ours, theirs = (compare_export(program, place, args) for place in (folder, tmp_path / "x"))
    assert theirs == ours
    assert not theirs.note
    assert (tmp_path / "x" / "model.onnx").read_bytes() == before


def test_bench_feeds_it(exported, tmp_path: Path) -> None:
    program, folder, _ = exported("single_key", "w4a4", "onnxruntime")
    export_program(program, "onnxruntime", tmp_path / "x", names="optimum")
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, verification_inputs(program, 2), strict=True)}
    loaded = [RUNTIMES["onnxruntime"](1)(place / "model.onnx", feeds) for place in (folder, tmp_path / "x")]
    np.testing.assert_array_equal(*(one.output() for one in loaded))


def test_a_pipeline_draws_the_same_images(tmp_path: Path) -> None:
    """What `sample`, `eval` and `serve` call."""
    pipeline, program, images = saved_pipeline("classes"), traced_pipeline("classes"), []
    for names in ("hqc", "optimum"):
        export_program(program, "onnxruntime", tmp_path / names, names=names, pipeline=pipeline)
        pipe = load(tmp_path / names).pipeline()
        generator = torch.Generator().manual_seed(0)
        images.append(pipe(class_labels=[3], num_inference_steps=2, generator=generator, output_type="np").images)
    np.testing.assert_array_equal(*images)
