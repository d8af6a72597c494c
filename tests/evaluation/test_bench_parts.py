"""The parts of `hqc bench` without processes or models: turns, figures, workspace, machine, worker protocol, chart."""

import gc
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from hqc.errors import ArtefactError, EvaluationError, RuntimeMissingError
from hqc.evaluation.bench import worker
from hqc.evaluation.bench.batches import read_batches, write_batches
from hqc.evaluation.bench.chart import chart_bytes, chart_figure, save_chart
from hqc.evaluation.bench.contender import Loaded
from hqc.evaluation.bench.machine import describe_machine, has_vnni, isa_flags, machine_line
from hqc.evaluation.bench.memory import peak_resident_bytes, resident_bytes
from hqc.evaluation.bench.peers import PEERS, find_peers
from hqc.evaluation.bench.result import BenchResult, Figures, Spread, spread
from hqc.evaluation.bench.rounds import take_turns
from hqc.evaluation.bench.table import bench_table
from hqc.evaluation.drawing import check_chart
from hqc.evaluation.workspace import Stage, Workspace
from hqc.machine import available_cores
from hqc.storage import atomic_folder, write_manifest

# ---- turns ---------------------------------------------------------------------------------------------------------


class Fake:
    """Writes its name down and takes one millisecond more each time; fails at the run that it is told to."""

    def __init__(self, name: str, log: list[str], fails_at: int = -1) -> None:
        self.name, self.log, self.fails_at, self.calls = name, log, fails_at, 0

    def run(self) -> float:
        self.log.append(self.name)
        self.calls += 1
        if self.calls == self.fails_at:
            raise EvaluationError(self.name, "broke", "Mend it.")
        return float(self.calls)


def turns(log: list[str], runs: int, warm_up: int, **fails_at: int) -> Any:
    runners = {name: Fake(name, log, fails_at.get(name, -1)) for name in "abc"}
    return take_turns(runners, runs=runs, warm_up=warm_up, pause=lambda: log.append("."))


def test_one_run_of_each_a_round_with_a_pause_before_and_another_first_each_time() -> None:
    log: list[str] = []
    rounds = turns(log, runs=2, warm_up=1)
    assert "".join(log) == ".a.b.c" + ".b.c.a" + ".c.a.b"
    assert rounds.milliseconds == dict.fromkeys("abc", (2.0, 3.0))  # the first call warmed up
    assert rounds.failed == {}


def test_a_contender_that_fails_is_dropped_and_the_others_go_on() -> None:
    log: list[str] = []
    rounds = turns(log, runs=3, warm_up=0, b=2)
    assert rounds.failed == {"b": "broke"}
    assert rounds.milliseconds == {"a": (1.0, 2.0, 3.0), "c": (1.0, 2.0, 3.0)}
    assert log.count("b") == 2


# ---- figures -------------------------------------------------------------------------------------------------------


def figures(*milliseconds: float, notes: tuple[str, ...] = ()) -> Figures:
    return Figures("a model", "torch", milliseconds, 10**6, Loaded(0.5, 1, 2), 3 * 10**6, 4 * 10**6, 0.25, notes)


def result(**changes: Any) -> BenchResult:
    made = BenchResult(
        model="digits",
        quantisation="w4a4 rtn",
        protocol={"batch_size": 2, "threads": 1, "runs": 3, "warm_up": 1, "calibration": "noise"},
        machine=describe_machine(),
        stages=(Stage("integer", 1.5, False),),
        ours=figures(1.0, 2.0, 10.0),
        peers={"torch": figures(2.0, 6.0, 10.0), "onnxruntime-int8": figures(0.5, 1.0, 5.0, notes=("a <note>",))},
        failed={"onnxruntime-fp32": "no [memory] … & more"},
    )
    return replace(made, **changes)


def test_the_speedup_is_the_median_of_the_rounds_ratios() -> None:
    said = result().to_dict()
    assert said["speedup"] == {"torch": 2.0, "onnxruntime-int8": 0.5}  # not 6/2 = 3: medians of unlike rounds
    assert said["speedup_spread"]["torch"] == pytest.approx([1.2, 2.8])  # of 1, 2, 3
    assert said["milliseconds"]["hqc"] == {"median": 2.0, "p10": 1.2, "p90": 8.4, "runs": [1.0, 2.0, 10.0]}


def test_the_data_are_json_and_every_figure_is_explained() -> None:
    said = result().to_dict()
    assert json.loads(json.dumps(said, allow_nan=False)) == said
    assert said["definitions"].keys() <= said.keys()
    by_contender = ("milliseconds", "size_bytes", "resident_bytes", "load_seconds", "error_to_float", "what")
    assert all(list(said[name]) == ["hqc", "torch", "onnxruntime-int8"] for name in by_contender)
    assert said["failed"] == {"onnxruntime-fp32": "no [memory] … & more"}


@given(st.lists(st.floats(1e-3, 1e6), min_size=1, max_size=50))
def test_a_spread_lies_in_order_within_its_values(values: list[float]) -> None:
    found, slack = spread(values), 1e-9 * max(values) + 1e-12  # percentiles are rounded to 12 digits
    assert min(values) - slack <= found.p10 <= found.median + slack
    assert found.median <= found.p90 + slack <= max(values) + 2 * slack


def test_a_spread_of_one() -> None:
    assert spread([4.0]) == Spread(4.0, 4.0, 4.0)


def test_the_table_is_markdown_with_the_ratio_first_and_the_failures() -> None:
    console = Console(width=200, file=io.StringIO())
    console.print(bench_table(result()), soft_wrap=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    header = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert header[:2] == ["model", "hqc is faster by"]
    assert set(lines[1]) <= set("|-:")
    assert "2.00× (1.20–2.80)" in text
    assert "onnxruntime-fp32: no [memory] … & more" in text
    assert "onnxruntime-int8: a <note>" in text
    assert "batch 2, 1 threads; 3 rounds after 1" in text


# ---- the chart -----------------------------------------------------------------------------------------------------


SVG = "{http://www.w3.org/2000/svg}"


def test_the_svg_is_well_formed_and_says_everything() -> None:
    root = ElementTree.fromstring(chart_bytes(result(model="a $model_2$"), "svg"))
    texts = [element.text or "" for element in root.iter(f"{SVG}text")]
    for wanted in (
        "a $model_2$, w4a4 rtn",
        "hqc w4a4 rtn",
        "2.00",
        "6.00  (2.00×)",
        "1.00  (0.50×)",
        "onnxruntime-fp32",
    ):
        assert wanted in texts
    assert "failed: no [memory] … & more" in texts
    assert any(text.startswith("batch 2, 1 threads, median of 3 rounds") for text in texts)
    fills = [element.get("style", "") for element in root.iter(f"{SVG}path")]
    assert sum("fill: #2a6f97" in fill for fill in fills) == 3  # ours: time, files, memory
    assert sum("fill: #b8bec6" in fill for fill in fills) == 2 * 3


def test_bars_are_medians_and_whiskers_percentiles() -> None:
    times, files, memory = chart_figure(result()).axes
    assert [bar.get_width() for bar in times.patches] == [2.0, 6.0, 1.0]
    whisker = times.collections[0].get_segments()[0]  # type: ignore[attr-defined]
    assert whisker[:, 0] == pytest.approx([1.2, 8.4])
    assert [bar.get_width() for bar in files.patches] == [1.0] * 3
    assert [bar.get_width() for bar in memory.patches] == [3.0] * 3


@pytest.mark.parametrize("failed", [{}, {"torch-compile": "very long reason " * 30, "tensorrt": "no GPU"}])
@pytest.mark.parametrize("slow", [1.0, 123456.0])
def test_no_text_lies_on_another_or_leaves_the_page(failed: dict[str, str], slow: float) -> None:
    peers = {"onnxruntime-fp32": figures(slow, 2 * slow, 3 * slow), "torch": figures(0.1, 0.2, 0.3)}
    figure = chart_figure(result(peers=peers, failed=failed, model="arch:" + "long-name " * 20))
    figure.draw_without_rendering()
    shown = [t for t in figure.findobj(Text) if isinstance(t, Text) and t.get_text() and t.get_visible()]
    boxes = [(text.get_text(), text.get_window_extent()) for text in shown]
    assert len(boxes) >= 3 * 3 + 3 + 3
    assert [(a, b) for i, (a, x) in enumerate(boxes) for b, y in boxes[i + 1 :] if x.overlaps(y)] == []
    page = figure.bbox
    for _, box in boxes:
        assert page.x0 <= box.x0 < box.x1 <= page.x1
        assert page.y0 <= box.y0 < box.y1 <= page.y1


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figures_are_the_same_file_whatever_the_users_style(kind: str) -> None:
    import matplotlib

    first = chart_bytes(result(), kind)
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        assert chart_bytes(result(), kind) == first


def test_the_png_has_bars_in_both_colours(tmp_path: Path) -> None:
    save_chart(tmp_path / "chart.png", result(model="no glyph: 漢 \x1b"))
    image = Image.open(tmp_path / "chart.png").convert("RGB")
    colours = {colour for _, colour in image.getcolors(10**6) or ()}
    assert {(0x2A, 0x6F, 0x97), (0xB8, 0xBE, 0xC6), (0xFA, 0xFA, 0xF8)} <= colours


def test_a_chart_without_matplotlib_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RuntimeMissingError, match=r"--chart: matplotlib is not installed\. .*hqc\[report\]"):
        check_chart(tmp_path / "chart.png", force=False)


def test_a_chart_is_a_png_or_an_svg_and_not_overwritten(tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"neither \.png nor \.svg"):
        check_chart(tmp_path / "chart.pdf", force=True)
    (tmp_path / "chart.svg").write_text("mine")
    with pytest.raises(ArtefactError, match="already exists"):
        check_chart(tmp_path / "chart.svg", force=False)
    check_chart(tmp_path / "chart.svg", force=True)


# ---- the workspace -------------------------------------------------------------------------------------------------


def builder(log: list[str], text: str) -> Any:
    def build(target: Path) -> None:
        log.append(text)
        with atomic_folder(target, force=True) as folder:
            (folder / "data").write_text(text)
            write_manifest(folder, "hqc-test", {})

    return build


def make(folder: Path, depends: dict[str, Any] | None, log: list[str], text: str, **options: Any) -> Workspace:
    space = Workspace(folder, **options)
    assert (space.make("thing", "hqc-test", depends, builder(log, text)) / "data").is_file()
    return space


def test_a_stage_is_made_again_only_when_what_it_depends_on_changed(tmp_path: Path) -> None:
    log: list[str] = []
    first = make(tmp_path / "w", {"bits": 4}, log, "one")
    second = make(tmp_path / "w", {"bits": 4}, log, "two")
    third = make(tmp_path / "w", {"bits": 3}, log, "three")
    assert log == ["one", "three"]
    assert [space.done[0].reused for space in (first, second, third)] == [False, True, False]
    assert (tmp_path / "w" / "thing" / "data").read_text() == "three"


def test_a_damaged_artefact_and_one_of_unknown_origin_are_made_again(tmp_path: Path) -> None:
    log: list[str] = []
    make(tmp_path, {}, log, "one")
    (tmp_path / "thing" / "data").write_text("xxx")
    make(tmp_path, {}, log, "two")
    make(tmp_path, None, log, "three")
    make(tmp_path, None, log, "four")
    assert log == ["one", "two", "three", "four"]


def test_a_stage_that_was_interrupted_is_made_again(tmp_path: Path) -> None:
    log: list[str] = []
    make(tmp_path, {"n": 1}, log, "one")

    def die(target: Path) -> None:
        builder(log, "half")(target)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Workspace(tmp_path).make("thing", "hqc-test", {"n": 2}, die)
    (tmp_path / ".thing.half").mkdir()  # what a kill in the middle of writing leaves
    make(tmp_path, {"n": 1}, log, "again")  # the place holds what {"n": 2} made
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stages.json", "thing"]
    assert log == ["one", "half", "again"]


def test_what_the_workspace_did_not_make_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thing").mkdir()
    with pytest.raises(ArtefactError, match="not written by hqc"):
        make(tmp_path, {}, [], "one", force=True)
    (tmp_path / "thing").rmdir()
    with atomic_folder(tmp_path / "thing") as folder:
        (folder / "data").write_text("somebody's")
        write_manifest(folder, "hqc-test", {})
    with pytest.raises(ArtefactError, match="already exists"):
        make(tmp_path, {}, [], "one")
    make(tmp_path, {}, [], "one", force=True)


@pytest.mark.parametrize("text", ["", "[1]", "{", '{"thing": 5}'])
def test_unreadable_records_count_as_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    log: list[str] = []
    make(tmp_path, {}, log, "one", force=True)
    make(tmp_path, {}, log, "two")
    assert log == ["one"]


def test_a_stage_is_made_once_a_run(tmp_path: Path) -> None:
    log: list[str] = []
    space = make(tmp_path, None, log, "one")
    space.make("thing", "hqc-test", None, builder(log, "two"))
    assert log == ["one"]
    assert len(space.done) == 1


# ---- peers, machine, memory ----------------------------------------------------------------------------------------


def test_peers_by_name() -> None:
    assert find_peers(" torch,onnxruntime-fp32,torch ") == ("torch", "onnxruntime-fp32")
    with pytest.raises(EvaluationError, match=r"tensorflow.*There are onnxruntime-fp32, onnxruntime-int8, torch"):
        find_peers("torch,tensorflow")
    with pytest.raises(EvaluationError, match="names no peer"):
        find_peers(" , ")
    on_gpu = {"torch-fp16-compile", "torch-fp16-cudagraph"}
    on_cpu = {"onnxruntime-fp32", "onnxruntime-int8", "torch", "torch-compile", "openvino-int8", "hqc-onnxruntime"}
    assert set(PEERS) == on_cpu | on_gpu


def test_calibration_batches_come_back_in_order(tmp_path: Path) -> None:
    batches = [{"sample": np.full((2, 3), i, np.float32), "timestep": np.float32([i, i])} for i in range(12)]
    write_batches(tmp_path / "b.npz", batches)
    back = list(read_batches(tmp_path / "b.npz"))
    assert [batch.keys() for batch in back] == [{"sample", "timestep"}] * 12
    assert [float(batch["sample"][0, 0]) for batch in back] == list(range(12))


@pytest.mark.parametrize(
    ("text", "flags"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_vnni avx2x\n", ("avx2", "avx512_vnni")),
        ("Features\t: fp asimd asimddp i8mm\n", ("asimd", "asimddp", "i8mm")),
        ("", ()),
    ],
)
def test_isa_flags(text: str, flags: tuple[str, ...]) -> None:
    assert isa_flags(text) == flags


def test_vnni_decides_about_seven_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert has_vnni(["avx2", "avx512_vnni"])
    assert not has_vnni(["avx2", "avx512f"])
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    assert has_vnni([])


def test_the_machine_is_described_without_its_name() -> None:
    import platform

    machine = describe_machine()
    assert machine["cores"] == available_cores() >= 1
    assert machine["memory_bytes"] > 10**8
    assert {"hqc", "torch", "onnxruntime"} <= machine["versions"].keys()
    line = machine_line(machine)
    assert machine["cpu"] in line
    assert platform.node() not in json.dumps(machine)


def test_memory_of_this_process() -> None:
    gc.collect()  # what goes away meanwhile would hide the block
    before = resident_bytes()
    block = np.ones(32 * 2**20)  # 256 MiB
    assert resident_bytes() - before > 0.7 * block.nbytes
    assert peak_resident_bytes() >= resident_bytes() - 2**20


# ---- the worker's protocol -----------------------------------------------------------------------------------------


def ask(*requests: dict[str, Any]) -> list[dict[str, Any]]:
    answers = io.StringIO()
    worker.serve(io.StringIO("".join(json.dumps(request) + "\n" for request in requests)), answers)
    return [json.loads(line) for line in answers.getvalue().splitlines()]


def test_the_worker_answers_every_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def double(threads: int) -> Any:
        return lambda model, inputs: worker.on_cpu(lambda: threads * inputs["x"])

    monkeypatch.setitem(worker.RUNTIMES, "double", double)  # type: ignore[arg-type]
    np.savez(tmp_path / "in.npz", x=np.float32([1, 2]))
    load = {"do": "load", "runtime": "double", "model": "m", "inputs": str(tmp_path / "in.npz"), "threads": 3}
    loaded, ran, out, memory, stopped = ask(
        load, {"do": "run"}, {"do": "output", "file": str(tmp_path / "out.npy")}, {"do": "memory"}, {"do": "stop"}
    )
    assert loaded["load_seconds"] >= 0
    assert loaded["loaded_resident_bytes"] > 0
    assert ran["milliseconds"] >= 0
    assert out == stopped == {}
    assert memory["peak_resident_bytes"] >= memory["resident_bytes"] - 2**20
    assert np.load(tmp_path / "out.npy").tolist() == [3, 6]


def test_the_worker_reports_what_goes_wrong_and_goes_on() -> None:
    first, second, third = ask({"do": "run"}, {"do": "load", "inputs": "/nowhere.npz"}, {"do": "memory"})
    assert first == {"error": "RuntimeError: no model is loaded"}
    assert second["error"].startswith("FileNotFoundError")
    assert third["resident_bytes"] > 0
