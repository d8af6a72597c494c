"""`hqc tune`: the products of a real program, without a GPU; its command line, and what it says where it cannot run."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import pytest
import torch
import zoo
from click.testing import CliRunner, Result
from integer_programs import quantised
from pretended_card import pretended_card

from hqc.capture import trace
from hqc.cli import main
from hqc.kernels.calls import Work
from hqc.kernels.cards import H100, card_of
from hqc.kernels.products import ProductTile
from hqc.kernels.tuned import read_table
from hqc.kernels.tuning import load_tuning
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions
from hqc.runtimes.integer.cuda import CudaSession
from hqc.runtimes.integer.cuda import tune as module
from hqc.runtimes.integer.cuda.tune import products_of, tune_program
from hqc.runtimes.integer.kernel_set import triton_kernels
from hqc.storage import save_program

CPU = torch.device("cpu")


def hqc(*arguments: object) -> Result:
    """Runs one command in this process."""
    return CliRunner(catch_exceptions=False).invoke(main, ["tune", *map(str, arguments)])


@pytest.fixture(scope="module")
def program() -> Program:
    """A small denoiser, quantised."""
    return cast(Program, quantised(trace(zoo.geometry()), "w4a4"))


@pytest.fixture
def without_a_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """triton believes that there is an H100, and the launchers that tensors are on it; nothing runs."""
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("this process interprets kernels")
    for name in ("launch", "quantisers"):
        monkeypatch.setattr(f"hqc.kernels.{name}.check_devices", lambda *_: None)
    with pretended_card():
        yield


@pytest.mark.usefixtures("without_a_card")
def test_the_products_of_a_program_are_those_of_its_module(program: Program) -> None:
    works = products_of(program, (1, 2), triton_kernels(), BuildOptions(CPU, pack=True))
    shapes = {w.product for w in works}
    assert len(shapes) == len(works)
    single = products_of(program, (1,), triton_kernels(), BuildOptions(CPU, pack=True))
    assert sum(w.count for w in works) == 2 * sum(w.count for w in single)
    assert {w.product.taps for w in works} == {1, 3, 9}
    assert any(w.product.rotation > 1 for w in works)
    unpacked = products_of(program, (1,), triton_kernels(), BuildOptions(CPU, pack=False))
    assert all(w.product.rotation == 1 for w in unpacked)
    for work in works:
        assert work.call.empty(CPU).weight_bytes() > 0


class MadeUpTimer:
    """Every tile takes a microsecond, the last one less."""

    def prepare(self, work: Work, tiles: Sequence[ProductTile]) -> None:
        pass

    def time(self, work: Work, tiles: Sequence[ProductTile]) -> list[float | str]:
        return [1.0 / (1 + index) for index in range(len(tiles))]


@pytest.fixture
def with_a_made_up_timer(without_a_card: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As far as the command can tell there is an H100."""

    @contextmanager
    def timer(device: torch.device) -> Iterator[MadeUpTimer]:
        yield MadeUpTimer()

    @contextmanager
    def device(_: object) -> Iterator[None]:
        yield

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(module, "cuda_timer", timer)
    monkeypatch.setattr(module, "require_gpu", lambda: None)
    monkeypatch.setattr("hqc.runtimes.integer.cuda.session.require_gpu", lambda: None)
    monkeypatch.setattr("torch.cuda.device", device)
    monkeypatch.setattr(module, "DEVICE", "cpu")


@pytest.mark.usefixtures("with_a_made_up_timer")
def test_the_winners_are_kept_where_sessions_look(program: Program, tmp_path: Path) -> None:
    save_program(program, tmp_path / "model.hqc")
    done = hqc(tmp_path / "model.hqc", "--batch-size", "1,2", "--json")
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    path = tmp_path / "cache" / "hqc" / "tiles" / f"{H100.slug}.json"
    assert report["file"] == str(path)
    table = read_table(path)
    assert len(table.products) == report["measured"] == len(report["products"])
    assert report["us_after"] < report["us_before"]
    again = hqc(tmp_path / "model.hqc", "--batch-size", "1,2")
    assert again.exit_code == 0
    assert f"there already  {report['measured']} products" in again.stdout
    other = hqc(tmp_path / "model.hqc", "--batch-size", "1", "--output", tmp_path / "own.json")
    assert "time of a call" in other.stdout
    assert read_table(tmp_path / "own.json").products.keys() < table.products.keys()


def refused(*arguments: object) -> str:
    """The one line of a command that does not run."""
    done = hqc(*arguments)
    assert done.exit_code == 2, done.output
    assert done.stderr.count("\n") == 1
    return done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    assert "CUDA" in refused(tmp_path)


@pytest.mark.usefixtures("with_a_made_up_timer")
def test_what_it_does_not_take(program: Program, tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path / "nowhere")
    save_program(trace(zoo.two_sites()), tmp_path / "float.hqc")
    assert "the program is not quantised" in refused(tmp_path / "float.hqc")
    save_program(program, tmp_path / "model.hqc")
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "cannot be written" in refused(tmp_path / "model.hqc", "--output", tmp_path / "file" / "tiles.json")
    done = hqc(tmp_path / "model.hqc", "--batch-size", "0")
    assert done.exit_code == 2
    assert "'0' is not a size" in done.stderr


@pytest.mark.gpu
def test_on_a_gpu_every_tile_gives_the_same_bits_and_the_session_takes_the_quickest(
    program: Program, tmp_path: Path
) -> None:
    path, inputs = tmp_path / "tiles.json", [tensor.cuda() for tensor in program.example_inputs(2, seed=1)]
    report = tune_program(program, (2,), output=path)
    assert report.problems == []
    assert report.measured
    assert all(0 < m.best.us <= m.before.us for m in report.measured)
    table, line = load_tuning(path, card_of(torch.device("cuda")))
    assert line.startswith("tiles: tuned on this card")
    assert table is not None
    usual, tuned = (CudaSession(program, tune=tune) for tune in ("off", path))
    assert tuned.report.tiles == line
    assert torch.equal(tuned(*inputs), usual(*inputs))
    assert tune_program(program, (2,), output=path).kept == len(report.measured)
