"""`hqc build-engine`: what it prints, and that every refusal is one line, status 2, and leaves the folder alone."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import engine_graphs as graphs
import pytest
from click.testing import CliRunner, Result

from hqc.cli import main
from hqc.engines import load_plan
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import Program
from hqc.storage import save_program


def run(*arguments: object) -> Result:
    return CliRunner(catch_exceptions=False).invoke(main, list(map(str, arguments)))


def hqc(*arguments: object) -> Result:
    return run("build-engine", *arguments)


@pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX has no wheel for macOS")
def test_it_builds_and_says_what_it_built(tmp_path: Path) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    done = hqc(folder, "--arch", "sm_86,sm_89", "--max-batch", 4, "--workspace", 64, "--json")
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["folder"] == str(folder)
    assert list(said["engines"]) == ["rtx_sm86", "rtx_sm89"]
    for engine in said["engines"].values():
        assert engine["quantised_products"] == engine["int8"] == 1
        assert engine["layers"] > 4
        assert engine["size_bytes"] == (folder / engine["file"]).stat().st_size
    entry = json.loads((folder / "build.json").read_text())["engines"]["rtx_sm86"]
    assert entry["options"]["profile"] == {"min": 1, "opt": 2, "max": 4}
    assert entry["options"]["workspace_bytes"] == 64 * 2**20
    text = hqc(folder, "--arch", "sm_86", "--opt-batch", 1, "--no-tf32", "--force").stdout
    assert text.startswith(f"built {folder}: 1 engine, ")
    assert "INT8 in 1 of 1 quantised products" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--arch", "sm_90"), "architecture sm_90 (Hopper: H100, H200): TensorRT-RTX builds for"),
        (("--arch", "sm_99"), "architecture sm_99: is not known."),
        (("--arch", ","), "--arch: names no architecture."),
        (("--min-batch", 4, "--max-batch", 2), "profile of batches 4…2…2: is no range"),
        (("--opt-batch", 9), "profile of batches 1…9…8: is no range"),
    ],
    ids=str,
)
def test_refusals(tmp_path: Path, arguments: tuple[object, ...], said: str) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    before = sorted(path.name for path in folder.iterdir())
    done = hqc(folder, *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"hqc: {said}")
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.output
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("name", ["none", "file"])
def test_no_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    done = hqc(tmp_path / name, "--arch", "sm_86")
    assert done.exit_code == 2
    assert "no such folder" in done.stderr


def test_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.engines.builders.package_version", lambda package: None)
    folder = graphs.save_export(tmp_path / "x", graphs.conv_model())
    for engine, install in (("rtx", "pip install 'hqc[rtx]'"), ("trt", "pip install tensorrt --extra-index-url")):
        done = hqc(folder, "--engine", engine)
        assert done.exit_code == 2
        assert "is not installed. Run `" + install in done.stderr


# ---- hqc export --engine -------------------------------------------------------------------------------------------


@pytest.fixture
def program(captured: Callable[[str], Program], tmp_path: Path) -> Path:
    """A quantised program in a folder."""
    steps = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq((0.0, 500.0))]
    save_program(run_pipeline(captured("in_place"), steps), tmp_path / "p.hqc")
    return tmp_path / "p.hqc"


@pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX has no wheel for macOS")
def test_an_export_builds_too(program: Path, tmp_path: Path) -> None:
    asked = ("--target", "tensorrt", "--engine", "rtx", "--arch", "sm_89", "--max-batch", 2)
    done = run("export", program, "-o", tmp_path / "json", *asked, "--json")
    assert done.exit_code == 0, done.output
    engine = json.loads(done.stdout)["engines"]["rtx_sm89"]
    assert engine["quantised_products"] == engine["int8"] == 2
    assert load_plan(tmp_path / "json", "sm_89").record.options["profile"] == {"min": 1, "opt": 2, "max": 2}
    text = run("export", program, "-o", tmp_path / "text", *asked).stdout
    assert text.startswith("exported ")
    assert f"\nbuilt {tmp_path / 'text'}: 1 engine, " in text


@pytest.mark.skipif(find_spec("triton") is None, reason="triton has no wheel for this platform")
def test_an_export_with_plugins_holds_their_kernels(program: Path, tmp_path: Path) -> None:
    folder = tmp_path / "x"
    asked = ("--target", "tensorrt", "--plugins", "qdp", "--plugin-arch", "sm_80")
    done = run("export", program, "-o", folder, *asked, "--json")
    assert done.exit_code == 0, done.output
    kernels = json.loads((folder / "plugins" / "plugins.json").read_text())["kernels"]
    assert {arch for kernel in kernels.values() for arch in kernel["archs"]} == {"sm_80"}
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert {f"plugins/{kernel['archs']['sm_80']['file']}" for kernel in kernels.values()} <= files.keys()


def test_plugins_without_triton(program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run("export", program, "-o", tmp_path / "x", "--target", "tensorrt", "--plugins", "qdp")
    assert done.exit_code == 2
    assert not (tmp_path / "x").exists()
    assert done.stderr == "hqc: --plugins qdp: triton is not installed. Run `pip install 'hqc[gpu]'`.\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--engine", "rtx"), "--engine rtx: is not for target onnxruntime. Give --target tensorrt."),
        (("--target", "tensorrt", "--arch", "sm_86"), "--arch: is for engines, and none is asked for. Give --engine"),
        (("--target", "tensorrt", "--no-tf32"), "--tf32/--no-tf32: is for engines"),
        (("--target", "tensorrt", "--plugin-arch", "sm_86"), "--plugin-arch sm_86: is for plugins, and none are asked"),
        (
            ("--target", "tensorrt", "--plugins", "qdp", "--plugin-arch", "sm_75"),
            "plugins for sm_75: there are kernels",
        ),
        (("--plugin-arch", "sm_86"), "--plugin-arch sm_86: is not for target onnxruntime. Give --target tensorrt"),
        (("--target", "tensorrt", "--engine", "rtx", "--plugins", "qdp"), "--engine rtx: takes no plugins."),
        (("--target", "tensorrt", "--engine", "rtx", "--arch", "sm_90"), "architecture sm_90 (Hopper: H100, H200): "),
    ],
    ids=str,
)
def test_an_export_is_refused_before_it_starts(program: Path, arguments: tuple[str, ...], said: str) -> None:
    done = run("export", program, "-o", program.parent / "x", *arguments)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"hqc: {said}")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in program.parent.iterdir()] == ["p.hqc"]
