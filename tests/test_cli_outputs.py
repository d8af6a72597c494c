"""Where commands write: nothing of the user's is replaced, lost or left lying about, and what fails is said."""

import errno
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from tiny_pipeline import save_tiny_pipeline, traced_pipeline

import hqc.cli
from hqc.claims import claimed
from hqc.storage import load_program, save_program

ROOT = Path(hqc.cli.__file__).parents[1]
STEPS = ("--n-steps", "2")
QUICK = (*STEPS, "--calib-size", "1")


def run(*arguments: object) -> Result:
    return CliRunner(catch_exceptions=False).invoke(hqc.cli.main, [str(argument) for argument in arguments])


def ok(*arguments: object) -> Result:
    result = run(*arguments)
    assert result.exit_code == 0, result.stderr
    return result


def refused(*arguments: object) -> str:
    """The one line of a command that does not run."""
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("hqc: ")
    assert result.stderr.count("\n") == 1
    return result.stderr.removeprefix("hqc: ").rstrip("\n")


def names(folder: Path) -> list[str]:
    """Everything below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A pipeline, its program and an export of that."""
    work = tmp_path_factory.mktemp("outputs")
    source = save_tiny_pipeline(work / "pipeline")
    save_program(traced_pipeline("classes"), work / "float.hqc", pipeline=source)
    ok("export", work / "float.hqc", "-o", work / "float")
    return SimpleNamespace(work=work, source=source, program=work / "float.hqc", export=work / "float")


def raising(error: BaseException) -> Any:
    def call(*args: object, **kwargs: object) -> None:
        raise error

    return call


# ---- inside the source ---------------------------------------------------------------------------------------------


def test_an_output_inside_its_source_is_refused(made: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    before = names(made.work)
    monkeypatch.chdir(made.source)
    assert refused("trace", ".", "-o", "here.hqc") == (
        "here.hqc: lies inside ., which it is made from. Choose a place outside it."
    )
    for command in ("ptq", "qat", "export"):
        said = refused(command, made.program, "-o", made.program / "pipeline" / "x")
        assert "lies inside" in said
        assert len(said) < 500
    assert "lies inside" in refused("qat", made.program, "-o", "../x.hqc", "--work-dir", made.program / "run")
    assert names(made.work) == before


@pytest.mark.parametrize("work_dir", ["x.hqc", "x.hqc/run", "."])
def test_a_work_folder_and_an_output_that_overlap_are_refused(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, work_dir: str
) -> None:
    monkeypatch.chdir(tmp_path)
    output = "checkpoint" if work_dir == "." else "x.hqc"
    assert "overlap" in refused("qat", made.program, "-o", output, "--work-dir", work_dir)
    assert names(tmp_path) == []


@pytest.mark.parametrize("output", [".", "/"])
def test_an_output_without_a_name_is_refused(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"and the output {output} overlap" in refused("qat", made.program, "-o", output)
    assert names(tmp_path) == []


# ---- two commands --------------------------------------------------------------------------------------------------


@pytest.fixture
def writing(tmp_path: Path) -> Iterator[Path]:
    """tmp_path/out is being written by somebody else."""
    begun, over = threading.Event(), threading.Event()

    def other() -> None:
        with claimed(tmp_path / "out"):
            begun.set()
            over.wait(600)

    thread = threading.Thread(target=other)
    thread.start()
    begun.wait(60)
    yield tmp_path / "out"
    over.set()
    thread.join()


def test_the_second_command_on_a_path_is_refused_at_its_start(made: SimpleNamespace, writing: Path) -> None:
    before = names(writing.parent)
    for command in (
        ("trace", made.source, "-o", writing),
        ("ptq", made.program, "-o", writing),
        ("qat", made.program, "-o", writing),
        ("export", made.program, "-o", writing, "--force"),
        ("sample", made.program, "-o", writing),
        ("analyze", made.program, "-o", writing),
        ("compare", made.program, made.program, "--csv", writing),
    ):
        assert refused(*command) == (
            f"{writing}: is being written by another hqc command (process {os.getpid()}). "
            "Wait for it, or choose another name."
        )
        assert names(writing.parent) == before


# ---- runs that do not end ------------------------------------------------------------------------------------------


def test_an_interrupted_run_is_not_dropped(made: SimpleNamespace, tmp_path: Path) -> None:
    command = ("qat", made.program, "-o", tmp_path / "x.hqc", *QUICK, "--steps", "2", "--batch-size", "1")
    work = tmp_path / "x.hqc.training"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hqc.training.trajectories.walk", raising(KeyboardInterrupt()))
        stopped = run(*command)
    assert stopped.exit_code == 1
    assert f"the same command with --resume goes on from {work}" in stopped.stderr
    before = {path: path.read_bytes() for path in work.rglob("*") if path.is_file()}
    assert refused(*command) == (
        f"{work}: holds an unfinished run (no checkpoint yet). "
        "Give --resume to continue it, or --restart to drop it and begin anew."
    )
    assert "exclude each other" in refused(*command, "--resume", "--restart")
    assert {path: path.read_bytes() for path in work.rglob("*") if path.is_file()} == before
    ok(*command, "--restart")
    assert names(work) == ["log.jsonl"]


@pytest.mark.parametrize(
    ("command", "does"),
    [
        (("search", "--budget", "w4a8"), "hqc.search.search"),
        (("qr-adaptor", "--budget", "w4a8"), "hqc.search.joint.adapt"),
        (("compare-recipes", "--bits", "w4a4", "--recipes", "rtn"), "hqc.evaluation.comparison.run.compare_recipes"),
    ],
)
def test_what_keeps_its_work_says_where_on_an_interrupt(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...], does: str
) -> None:
    monkeypatch.setattr(does, raising(KeyboardInterrupt()))
    stopped = run(command[0], made.program, *command[1:], "-o", tmp_path / "x.md")
    assert stopped.exit_code == 1
    assert f"hqc: interrupted; the same command goes on from {tmp_path / 'x.md.work'}\n" in stopped.stderr


def test_a_run_that_was_killed_before_it_tidied_up_is_finished(made: SimpleNamespace, tmp_path: Path) -> None:
    output, work = tmp_path / "x.hqc", tmp_path / "x.hqc.training"
    command = ("qat", made.program, "-o", output, *QUICK, "--steps", "2", "--batch-size", "1", "--json")
    command = (*command, "--checkpoint-every", "1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hqc.api.finish_run", raising(KeyboardInterrupt()))
        assert run(*command).exit_code == 1
    assert {"08-distil.hqc", "run.json", "log.jsonl"} <= set(names(work))
    kept = (output / "weights.safetensors").read_bytes()
    # A result of other settings is not this run's, and another program is not either.
    assert "already exists" in refused(*command, "--resume", "--seed", "1")
    said = json.loads(ok(*command, "--resume").stdout)
    assert (said["program"], said["updates"]) == (str(output), 2)
    assert said["last_loss"] == json.loads((work / "log.jsonl").read_text().splitlines()[-1])["loss"]
    assert names(work) == ["log.jsonl"]
    ok(*command, "--resume")  # killed after tidying up
    assert (output / "weights.safetensors").read_bytes() == kept
    assert "already exists" in refused(*command)


# ---- what appears meanwhile ----------------------------------------------------------------------------------------


def test_a_folder_made_while_a_command_runs_is_kept(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def quantise(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "q.hqc").mkdir()
        (tmp_path / "q.hqc" / "notes.txt").write_text("precious")
        return load_program(made.program)

    monkeypatch.setattr("hqc.api.quantise", quantise)
    said = refused("ptq", made.program, "-o", tmp_path / "q.hqc", *QUICK)
    assert f"the result is kept as {tmp_path / 'q.hqc.new'}" in said
    assert (tmp_path / "q.hqc" / "notes.txt").read_text() == "precious"
    load_program(tmp_path / "q.hqc.new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q.hqc", "q.hqc.new"]


# ---- full disks ----------------------------------------------------------------------------------------------------


def test_a_table_that_does_not_fit_on_the_disk(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    said = refused("compare", made.program, made.program, "--inputs", "noise", "--csv", tmp_path / "x.csv")
    assert said == (
        f"{tmp_path / 'x.csv'}: cannot be written (No space left on device). Free some space or choose another place."
    )
    assert names(tmp_path) == []


full = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")


@full
def test_a_picture_for_a_full_device(made: SimpleNamespace) -> None:
    said = refused("sample", made.program, "-o", "/dev/full", *STEPS, "--labels", "1", "--per-class", "1")
    assert said.startswith("/dev/full: cannot be written (No space left on device).")


@full
def test_standard_output_that_is_full(made: SimpleNamespace) -> None:
    commands = [("", "inspect", str(made.program), "--json"), ("", "--help"), ("1", "--help")]
    for unbuffered, *arguments in commands:
        with open("/dev/full", "w") as device:
            done = subprocess.run(
                [sys.executable, "-m", "hqc.cli", *arguments],
                stdout=device,
                stderr=subprocess.PIPE,
                text=True,
                timeout=120,
                env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": unbuffered},
            )
        assert done.returncode == 2
        assert done.stderr == (
            "hqc: standard output: cannot be written (No space left on device). "
            "Free some space or choose another place.\n"
        )


def test_nothing_stays_in_the_temporary_folder(tmp_path: Path) -> None:
    """ONNX Runtime leaves a file `.ses` there when it is imported as usual."""
    script = "import os\nfrom hqc.export.ort_session import import_onnxruntime\nimport_onnxruntime().SessionOptions()\n"
    script += "assert 'ORT_DISABLE_TELEMETRY' not in os.environ"
    environment = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    subprocess.run(
        [sys.executable, "-c", script],
        check=True,
        timeout=120,
        env={**environment, "PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
    )
    assert names(tmp_path) == []
