"""What goes on: when a line is worth printing, how it reads, and that it goes to standard error alone."""

import subprocess
import sys
import threading
from contextlib import suppress

import pytest

from hqc import stages
from hqc.stages import Reporter, Stage, doing, each, reported


def test_a_stage_reads_as_what_is_known_of_it() -> None:
    stage = Stage("compiling  kernels")
    assert str(stage) == "compiling kernels"
    stage(3, 35, "int_gemm\nfp16")
    assert str(stage) == "compiling kernels: 3 of 35, int_gemm fp16"
    assert str(Stage("x" * 200)) == "x" * 99 + "…"


def test_quick_work_says_nothing_and_long_work_says_its_stage_every_ten_seconds() -> None:
    reporter, first = Reporter(100.0), Stage("reading")
    said = {now: reporter.line(100.0 + now, first) for now in (1, 9, 10, 11, 19, 21, 32)}
    assert {now: line for now, line in said.items() if line} == {
        10: "[ 10 s] reading",
        21: "[ 21 s] reading",
        32: "[ 32 s] reading",
    }


def test_a_new_stage_is_no_reason_for_another_line() -> None:
    reporter, first, second = Reporter(0.0), Stage("a"), Stage("b")
    assert reporter.line(10.0, first) == "[ 10 s] a"
    assert reporter.line(12.0, second) is None
    assert reporter.line(20.0, second) == "[ 20 s] b"


def test_no_stage_and_a_stage_that_a_bar_shows_give_no_line() -> None:
    assert Reporter(0.0).line(60.0, None) is None
    assert Reporter(0.0).line(60.0, Stage("training", drawn=True)) is None


def test_stages_nest_and_end_with_their_errors() -> None:
    with doing("outer") as outer:
        with suppress(KeyError), doing("inner"):
            assert [str(stage) for stage in stages._stages] == ["outer", "inner"]
            raise KeyError
        assert stages._stages == [outer]
    assert stages._stages == []


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be changed."""
    found = [0.0]
    monkeypatch.setattr(stages.time, "perf_counter", lambda: found[0])
    return found


def test_a_stage_says_how_long_the_rest_takes(now: list[float]) -> None:
    """At its pace since it was first told: what had been done before took no time."""
    stage, said = Stage("searching"), []
    for seconds, done in ((0, 0), (5, 100), (11, 120), (45, 260), (45.1, 280), (45.2, 299)):
        now[0] = float(seconds)
        stage(done, 300, "conv")
        said.append(str(stage).removeprefix("searching: "))
    assert said == [
        "0 of 300, conv",
        "100 of 300, conv",
        "120 of 300, 54 s left, conv",
        "260 of 300, 10 s left, conv",
        "280 of 300, 4 s left, conv",
        "299 of 300, conv",
    ]
    stage(1, 5)
    assert str(stage) == "searching: 1 of 5", "something else is counted"


def test_things_in_turn_count_by_their_size(now: list[float]) -> None:
    """What took 20 s is an eighth of what is left."""
    said = []
    for size in each("smoothing", [1, 1, 7, 1], float):
        said.append(str(stages._stages[-1]))
        now[0] += 20.0 * size
    assert said == [
        "smoothing: 0 of 4",
        "smoothing: 1 of 4",
        "smoothing: 2 of 4, 3 min left",
        "smoothing: 3 of 4, 20 s left",
    ]
    assert stages._stages == []
    assert list(each("nothing", [])) == []


def test_lines_are_written_while_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HQC_PROGRESS")
    monkeypatch.setattr(stages, "EVERY", 0.0)
    monkeypatch.setattr(stages, "_WAIT", 0.001)
    written, seen = list[str](), threading.Event()

    def write(line: str) -> None:
        written.append(line)
        seen.set()

    with reported(write), doing("waiting") as stage:
        stage(1, 4)
        assert seen.wait(60)
    assert set(written) == {"[  0 s] waiting: 1 of 4"}
    assert not any(thread.name == "hqc-progress" for thread in threading.enumerate())


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HQC_PROGRESS", "0")
    with reported():
        assert not any(thread.name == "hqc-progress" for thread in threading.enumerate())


def test_a_reader_that_has_gone_away_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Gone:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Gone())
    stages._to_stderr("a line")


def test_a_command_says_its_stage_on_standard_error_in_a_pipe() -> None:
    """Standard output holds what it holds without."""
    code = (
        "import sys, time, click\nfrom hqc import stages\nfrom hqc.cli import main\n"
        "stages.EVERY, stages._WAIT = 0.0, 0.001\nsaid = stages._to_stderr\n"
        "import threading\nseen = threading.Event()\n"
        "stages._to_stderr = lambda line: (said(line), seen.set())\n"
        "@click.command()\ndef long():\n"
        "    with stages.doing('waiting'):\n        assert seen.wait(60)\n    click.echo('done')\n"
        "main.add_command(long)\nmain(['long'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"HQC_PROGRESS": "", "PATH": ""}, check=True
    )
    assert done.stdout == "done\n"
    assert set(done.stderr.splitlines()) == {"[  0 s] waiting"}
