"""`load`: which runtime opens what, what it says when it cannot, and that both runtimes give one answer."""

import sys

import pytest
import torch

from hqc.errors import ArtefactError, EvaluationError, HqcError, RuntimeMissingError
from hqc.export import export_program
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.runtimes import load
from hqc.storage import save_program


@pytest.fixture(scope="module")
def program(captured):
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0, 900.0))]
    return run_pipeline(captured("cross_attention"), passes)


@pytest.fixture(scope="module")
def folders(program, captured, tmp_path_factory):
    root = tmp_path_factory.mktemp("artefacts")
    save_program(program, root / "tiny.hqc")
    export_program(captured("cross_attention"), "onnxruntime", root / "float.onnx")
    export_program(program, "onnxruntime", root / "tiny.onnx", float_program=captured("cross_attention"))
    return root


def inputs(program, batch=2):
    return program.example_inputs(batch, seed=7)


def test_runtimes_agree(captured, folders) -> None:
    program = captured("cross_attention")
    save_program(program, folders / "float.hqc", force=True)
    args = inputs(program)
    found = [load(folders / name).session(*args) for name in ("float.hqc", "float.onnx")]
    # float32 through 40 layers.
    assert float((found[0] - found[1]).norm() / found[0].norm()) <= 5e-6


def test_what_a_model_says_of_itself(program, folders) -> None:
    model, other = load(folders / "tiny.onnx", threads=1), load(folders / "tiny.hqc")
    assert (model.name, model.runtime, other.runtime) == ("tiny.onnx", "onnxruntime", "torch")
    assert model.plan.timesteps == other.plan.timesteps == (0.0, 500.0, 900.0)
    assert {p.site for p in model.plan.sites} == {p.site for p in other.plan.sites}
    assert model.size_bytes == (folders / "tiny.onnx" / "model.onnx").stat().st_size
    assert model.size_bytes < other.size_bytes / 3
    assert model.session.inputs == program.inputs


@pytest.mark.parametrize("timestep", [500, 500.0, torch.tensor(500), torch.tensor([500]), torch.tensor([500.0, 500.0])])
@pytest.mark.parametrize("name", ["tiny.hqc", "tiny.onnx"])
def test_timesteps_in_every_form(program, folders, name, timestep) -> None:
    session = load(folders / name, threads=1).session
    sample, _, condition = inputs(program)
    wanted = session(sample, torch.tensor([500.0, 500.0]), condition)
    assert torch.equal(session(sample, timestep, condition), wanted)


@pytest.mark.parametrize("name", ["tiny.hqc", "tiny.onnx", "digits"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": torch.zeros(2, 4, 8, 8)}, "sample"),
        ({"sample": torch.zeros(2, 3, 8)}, "sample"),
        ({"timestep": torch.zeros(3)}, "timestep"),
        ({"condition": None}, "condition"),
        ({"condition": torch.zeros(2, 2, 31)}, "condition"),
    ],
)
def test_inputs_that_do_not_fit(program, folders, name, change, message) -> None:
    session = load("digits" if name == "digits" else folders / name, threads=1).session
    good = dict(zip(("sample", "timestep", "condition"), inputs(program), strict=True))
    with pytest.raises(EvaluationError, match=message):
        session(**{**good, **change})


def test_an_unconditional_model_refuses_a_condition(captured, tmp_path) -> None:
    program = captured("two_sites")
    export_program(program, "onnxruntime", tmp_path / "x")
    session = load(tmp_path / "x").session
    sample, timestep = inputs(program)
    assert session(sample, timestep).shape == (2, 16, 5)
    with pytest.raises(EvaluationError, match="unconditional"):
        session(sample, timestep, torch.zeros(2, 1, 4))


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "runtime"), [("tiny.hqc", "onnxruntime"), ("tiny.onnx", "torch"), ("digits", "onnxruntime")]
)
def test_a_runtime_that_does_not_fit(folders, name, runtime) -> None:
    with pytest.raises(RuntimeMissingError, match="cannot run") as caught:
        load("digits" if name == "digits" else folders / name, runtime=runtime)
    assert caught.value.do


def test_an_unknown_runtime(folders) -> None:
    with pytest.raises(RuntimeMissingError, match="unknown"):
        load(folders / "tiny.hqc", runtime="tpu")


def test_without_onnxruntime(folders, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(RuntimeMissingError, match="not installed"):
        load(folders / "tiny.onnx")
    assert load(folders / "tiny.hqc").runtime == "torch"


def _truncate(folder) -> None:
    path = folder / "model.onnx"
    path.write_bytes(path.read_bytes()[:-1])


def _flip(folder) -> None:
    path = folder / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def _remove(folder) -> None:
    (folder / "model.onnx").unlink()


def _edit_manifest(old: str, new: str):
    def edit(folder) -> None:
        path = folder / "manifest.json"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))

    return edit


DAMAGE = {
    "truncated": _truncate,
    "one bit": _flip,
    "missing": _remove,
    "other version": _edit_manifest('"version": 1', '"version": 99'),
    "other kind": _edit_manifest('"format": "hqc-export"', '"format": "hqc-cake"'),
    "not json": _edit_manifest("{", "["),
    "outside": _edit_manifest('"model.onnx": {', '"../model.onnx": {'),
    "no inputs": _edit_manifest('"inputs"', '"outputs"'),
    "no origin": _edit_manifest('"origin"', '"orogen"'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_export_is_refused(captured, tmp_path, damage) -> None:
    folder = tmp_path / "x"
    export_program(captured("two_sites"), "onnxruntime", folder)
    DAMAGE[damage](folder)
    with pytest.raises(HqcError) as caught:
        load(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    "make", [lambda p: p.mkdir(), lambda p: None, lambda p: p.write_text("x")], ids=["empty", "none", "file"]
)
def test_no_artefact(tmp_path, make) -> None:
    make(tmp_path / "x")
    with pytest.raises(ArtefactError):
        load(tmp_path / "x")


def test_a_model_onnxruntime_refuses(captured, tmp_path) -> None:
    """Hashes that fit and a model that does not load: still one clear error."""
    from hqc.storage import write_manifest

    folder = tmp_path / "x"
    folder.mkdir()
    (folder / "model.onnx").write_bytes(b"nonsense")
    write_manifest(folder, "hqc-export", {"inputs": []})
    with pytest.raises(ArtefactError, match="refuses"):
        load(folder)
