"""The cache of optimised models: equal outputs to the bit, one entry a model and machine, damage and refusals."""

import pytest
import torch

from hqc.errors import ArtefactError
from hqc.export import export_program
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.runtimes import load
from hqc.runtimes.ort_cache import CACHE_KIND, cache_key, instruction_sets
from hqc.storage import check_manifest


@pytest.fixture(scope="module")
def program(captured):
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 900.0))]
    return run_pipeline(captured("cross_attention"), passes)


@pytest.fixture(scope="module")
def export(program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cached") / "tiny"
    export_program(program, "onnxruntime", folder)
    return folder


def entries(cache):
    return sorted(path for path in cache.iterdir() if not path.name.startswith("."))


def test_a_cached_model_gives_the_same_bits(program, export, tmp_path) -> None:
    args = program.example_inputs(2, seed=3)
    wanted = load(export, threads=1).session(*args)
    first = load(export, threads=1, cache=tmp_path / "cache").session(*args)
    (entry,) = entries(tmp_path / "cache")
    made = (entry / "model.onnx").stat().st_mtime_ns
    second = load(export, threads=1, cache=str(tmp_path / "cache")).session(*args)
    assert torch.equal(first, wanted)
    assert torch.equal(second, wanted)
    assert float(wanted.norm()) > 0
    assert (entry / "model.onnx").stat().st_mtime_ns == made, "the entry was not made again"
    assert check_manifest(entry, CACHE_KIND)["source"] == "tiny"


def test_a_damaged_entry_is_made_again(program, export, tmp_path) -> None:
    args = program.example_inputs(2, seed=3)
    wanted = load(export, threads=1, cache=tmp_path).session(*args)
    (entry,) = entries(tmp_path)
    (entry / "model.onnx").write_bytes(b"not a model")
    assert torch.equal(load(export, threads=1, cache=tmp_path).session(*args), wanted)
    assert entries(tmp_path) == [entry]
    check_manifest(entry, CACHE_KIND)


def test_a_cache_that_cannot_be_written_is_refused(export, tmp_path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ArtefactError, match="file"):
        load(export, cache=tmp_path / "file")


def test_the_key_depends_on_model_version_and_machine() -> None:
    files = {"model.onnx": {"sha256": "a"}, "plan.json": {"sha256": "b"}}
    same = cache_key({**files, "plan.json": {"sha256": "c"}}, "1.32", "avx2")
    others = {
        cache_key({"model.onnx": {"sha256": "z"}}, "1.32", "avx2"),
        cache_key({**files, "model.onnx.data": {"sha256": "d"}}, "1.32", "avx2"),
        cache_key(files, "1.33", "avx2"),
        cache_key(files, "1.32", "avx512"),
    }
    assert cache_key(files, "1.32", "avx2") == same
    assert len(others | {same}) == 5


def test_instruction_sets_come_from_the_processor(tmp_path) -> None:
    (tmp_path / "cpuinfo").write_text("model name : x\nflags\t\t: sse avx2\n")
    assert instruction_sets(tmp_path / "cpuinfo").endswith("avx2 sse")
    assert instruction_sets(tmp_path / "none")
