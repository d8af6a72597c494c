"""`hqc tune` without a GPU: a timer that is made up, files that are resumed or left out, kernels compiled ahead."""

import importlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from pretended_card import pretended_card

from hqc.errors import ArtefactError, KernelError
from hqc.kernels import Epilogue, Weight, int_conv2d, int_gemm, pack_weight
from hqc.kernels.calls import Call, Recorder, Work
from hqc.kernels.candidates import tuning_candidates
from hqc.kernels.cards import H100, Card
from hqc.kernels.measuring import TuningReport, begun_table, tune
from hqc.kernels.precompile import KernelJob, answer, compile_job, compilers, instead_of_launching
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import fits
from hqc.kernels.timing import equal_bits
from hqc.kernels.tuned import Table, Timed, read_table, shipped_table, write_table
from hqc.kernels.tuning import chosen_tile, force, load_tuning, tuning_file, use, watch

CPU = torch.device("cpu")
SMALL = Card("A card", (8, 9), 20, 99 * 1024)
TILE = ProductTile(64, 32, 32, 4, 3)


def work(rows: int, outputs: int = 128, channels: int = 64, count: int = 1, **limits: Any) -> Work:
    """A product of a made-up call."""
    return Work(Product(rows, outputs, channels), Call(int_gemm, ()), count, tuple(limits.get("limits", ((0, False),))))


@dataclass
class MadeUpTimer:
    """Large tiles are quick; what it is told is remembered."""

    prepared: list[Product] = field(default_factory=list)
    timed: list[Product] = field(default_factory=list)
    answer: Callable[[Product, ProductTile], float | str] = lambda product, tile: 1e6 / (tile.rows * tile.outputs)

    def prepare(self, work: Work, tiles: Sequence[ProductTile]) -> None:
        self.prepared.append(work.product)

    def time(self, work: Work, tiles: Sequence[ProductTile]) -> list[float | str]:
        self.timed.append(work.product)
        return [self.answer(work.product, tile) for tile in tiles]


# ---- what is measured ----------------------------------------------------------------------------------------------


def test_the_quickest_tiles_are_kept_the_longest_products_first(tmp_path: Path) -> None:
    works, timer, path = [work(64), work(8192), work(256, count=1000)], MadeUpTimer(), tmp_path / "tiles.json"
    notes: list[tuple[int, str]] = []
    report = tune(works, timer, SMALL, path, on_product=lambda done, note: notes.append((done, note)))
    assert [p.rows for p in timer.timed] == [256, 8192, 64] == [p.rows for p in timer.prepared]
    assert notes == [(1, "256×64→128"), (2, "8192×64→128"), (3, "64×64→128")]
    table = read_table(path)
    assert {p.rows for p in table.products} == {64, 256, 8192}
    best = table.products[Product(8192, 128, 64)][0]
    assert best.tile.rows * best.tile.outputs == max(
        t.tile.rows * t.tile.outputs for t in table.products[Product(8192, 128, 64)]
    )
    with use(table):
        assert chosen_tile(CPU, 8192, 128, 64) == best.tile
    assert report.us_after <= report.us_before
    assert report.to_dict()["measured"] == 3
    assert (report.kept, report.left, report.problems) == (0, 0, [])


def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    path, now = tmp_path / "tiles.json", iter(range(100))
    works = [work(8192), work(64), work(16)]
    first = tune(works, MadeUpTimer(), SMALL, path, limit_seconds=2, clock=lambda: float(next(now)))
    assert (len(first.measured), first.left) == (1, 2)

    def killed(product: Product, tile: ProductTile) -> float:
        if product.rows == 16:
            raise KeyboardInterrupt
        return 5.0

    with pytest.raises(KeyboardInterrupt):
        tune(works, MadeUpTimer(answer=killed), SMALL, path)
    timer = MadeUpTimer()
    last = tune(works, timer, SMALL, path)
    assert [p.rows for p in timer.timed] == [16] == [p.rows for p in timer.prepared]
    assert (last.kept, len(last.measured)) == (2, 1)
    assert len(read_table(path).products) == 3


def test_a_tile_with_other_bits_is_refused_and_named(tmp_path: Path) -> None:
    def answer(product: Product, tile: ProductTile) -> float | str:
        return "it gives other bits" if tile.rows > 64 else 7.0

    report = tune([work(8192)], MadeUpTimer(answer=answer), SMALL, tmp_path / "tiles.json")
    kept = read_table(tmp_path / "tiles.json").products[Product(8192, 128, 64)]
    assert kept
    assert all(timed.tile.rows <= 64 for timed in kept)
    assert any(p.startswith("8192×64→128 in 128×") and p.endswith("it gives other bits") for p in report.problems)


def test_a_product_without_a_usable_tile_is_not_kept(tmp_path: Path) -> None:
    report = tune([work(8192)], MadeUpTimer(answer=lambda *_: "no"), SMALL, tmp_path / "tiles.json")
    assert not report.measured
    assert not read_table(tmp_path / "tiles.json").products


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text("{", encoding="utf-8"), "is damaged"),
        (lambda path: write_table(path, Table(H100, {}, {})), "is of NVIDIA H100 80GB HBM3, not of A card"),
        (lambda path: write_table(path, Table(replace(SMALL, multiprocessors=10), {}, {})), "is of 10 multiproc"),
        (lambda path: write_table(path, Table(SMALL, {}, {"kernels": "0"})), r"is stale \(other kernels\)"),
        (
            lambda path: write_table(
                path, Table(SMALL, {}, begun_table(Path("/none"), SMALL)[0].made | {"triton": ""})
            ),
            r"is stale \(triton unknown",
        ),
    ],
    ids=["damaged", "card", "multiprocessors", "kernels", "triton"],
)
def test_a_file_that_does_not_fit_is_begun_anew_and_left_out(
    spoil: Callable[[Path], None], reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "tiles.json"
    spoil(path)
    table, line = load_tuning(path, SMALL)
    assert table is None
    assert re.search(reason, line)
    assert "\n" not in line
    assert line.startswith("tiles: modelled; no table for A card; ")
    report = tune([work(64)], MadeUpTimer(), SMALL, path)
    assert report.problems[0].endswith(": begun anew")
    assert load_tuning(path, SMALL)[1] == f"tiles: tuned on this card, 1 shape, {path}"


def test_a_folder_that_cannot_be_written_is_found_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    timer = MadeUpTimer()
    with pytest.raises(ArtefactError, match="cannot be written"):
        tune([work(64)], timer, SMALL, tmp_path / "file" / "tiles.json")
    assert not timer.prepared


@pytest.mark.parametrize("card", [H100, SMALL], ids=lambda card: card.slug)
def test_candidates_are_few_and_fit(card: Card) -> None:
    products = [
        Product(32768, 192, 192, 9),
        Product(128, 960, 960, 9),
        Product(2, 768, 192),
        Product(8, 3, 1),
        Product(8192, 384, 384, 1, 32),
        Product(512, 256, 256, 1, 256),
        Product(8192, 384, 960, 1, 1, True),
    ]
    for product in products:
        tiles = tuning_candidates(product, card, [(0, False)])
        assert 5 <= len(tiles) <= 24
        assert all(fits(product, tile, card) for tile in tiles)
        assert len(set(tiles)) == len(tiles)
        both = tuning_candidates(product, card, [(0, False), (64, False), (0, True)])
        assert any(64 % tile.rows == 0 for tile in both)
        assert any(tile.splits == 1 for tile in both)


# ---- which tile a launch takes -------------------------------------------------------------------------------------


def test_tiles_are_forced_used_and_watched() -> None:
    product = Product(8192, 192, 192, 9)
    usual = cast(Table, shipped_table(H100)).products[product][0].tile
    seen: list[tuple[Product, int, bool]] = []
    with use(Table(H100, {product: (Timed(1.0, TILE),)})), watch(lambda *asked: seen.append(asked)):
        assert chosen_tile(CPU, 8192, 192, 192, taps=9) == TILE
        with use(None):
            assert chosen_tile(CPU, 8192, 192, 192, taps=9, whole_rows=4096) == usual
        with force(replace(TILE, splits=2)):
            assert chosen_tile(CPU, 1, 1, 1).splits == 2
    assert chosen_tile(CPU, 8192, 192, 192, taps=9) == usual
    assert seen == [(product, 0, False), (product, 4096, False), (Product(1, 1, 1), 0, False)]


def test_where_tiles_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load_tuning("off", H100) == (None, "tiles: measured for NVIDIA H100 80GB HBM3 (shipped)")
    assert load_tuning("auto", H100) == load_tuning("off", H100)
    assert load_tuning("auto", SMALL) == (None, "tiles: modelled; no table for A card – run hqc tune")
    assert load_tuning("off", SMALL) == (None, "tiles: modelled; no table for A card")
    missing = load_tuning(tmp_path / "none.json", H100)[1]
    assert missing.endswith(f"; {tmp_path}/none.json cannot be read (No such file or directory)")
    tune([work(64), work(32)], MadeUpTimer(), SMALL, tuning_file(SMALL))
    table, line = load_tuning("auto", SMALL)
    assert line == f"tiles: tuned on this card, 2 shapes, {tmp_path}/hqc/tiles/a-card.json"
    assert table is not None
    assert len(table.products) == 2
    assert load_tuning("off", SMALL)[0] is None


# ---- calls ---------------------------------------------------------------------------------------------------------


def gemm_arguments(rows: int = 12, dtype: torch.dtype = torch.float16) -> tuple[Any, ...]:
    """Codes, weight, scale and epilogue of a small linear layer over two samples."""
    weight = Weight(torch.ones(32, 64, dtype=torch.int8), torch.ones(32))
    epilogue = Epilogue(torch.zeros(32), torch.zeros(2, rows // 2, 32, dtype=dtype), True, dtype)
    return torch.ones(2, rows // 2, 64, dtype=torch.int8), weight, torch.ones(2), epilogue


def test_calls_are_recorded_without_their_numbers_and_made_again() -> None:
    def product(codes: torch.Tensor, weight: Weight, scale: torch.Tensor, epilogue: Epilogue) -> torch.Tensor:
        chosen_tile(CPU, codes.shape[0] * codes.shape[1], len(weight.scale), codes.shape[-1])
        return codes.sum()

    recorder = Recorder()
    recorded = recorder.wrap(product)
    for rows in (12, 12, 8):
        assert float(recorded(*gemm_arguments(rows))) == rows * 64
    recorded(*gemm_arguments(12, torch.float32))
    works = {w.product: w for w in recorder.work()}
    assert {p: w.count for p, w in works.items()} == {Product(12, 32, 64): 3, Product(8, 32, 64): 1}
    call = works[Product(12, 32, 64)].call
    assert call.args[3].dtype == torch.float16, "the most frequent"
    assert "tensor(" not in call.key()
    made = call.random(CPU)
    codes, weight, scale, epilogue = made.args
    assert (codes.shape, codes.dtype, weight.codes.shape) == ((2, 6, 64), torch.int8, (32, 64))
    assert codes.min() >= -7
    assert codes.float().std() > 1
    assert 0.004 < scale.min() <= scale.max() < 0.02
    assert epilogue.silu
    assert epilogue.residual.dtype == torch.float16
    assert torch.equal(made.args[0], call.random(CPU).args[0]), "the same numbers every time"
    other = made.with_other_weight()
    assert torch.equal(other.args[1].codes, weight.codes)
    assert other.args[1].codes.data_ptr() != weight.codes.data_ptr()
    assert other.args[0] is codes
    assert made.weight_bytes() == 32 * 64
    assert float(made.run()) == float(codes.sum())


def test_operands_keep_their_strides() -> None:
    wide = torch.zeros(4, 96, dtype=torch.float16)
    operands = {"shift": wide[:, 32:64], "repeated": wide[:1].expand(3, 96), "index": torch.arange(3)}
    made = Call.of(int_gemm, (), operands).random(CPU).kwargs
    assert {name: tensor.stride() for name, tensor in made.items()} == {
        name: tensor.stride() for name, tensor in operands.items()
    }
    assert {name: tensor.shape for name, tensor in made.items()} == {n: t.shape for n, t in operands.items()}
    assert made["shift"].min() > 0
    assert made["index"].tolist() == [0, 0, 0]


def test_packed_weights_are_made_so_that_they_may_be_rotated() -> None:
    weight = Weight(pack_weight(torch.zeros(16, 256, dtype=torch.int8)), torch.ones(16), rotation=256)
    made = Call.of(int_gemm, (torch.ones(1, 256, dtype=torch.int8), weight, torch.ones(1)), {}).random(CPU)
    nibbles = {byte & 15 for byte in made.args[1].codes.flatten().tolist()}
    assert nibbles == {0, 1, 15}


def test_bits_are_compared_not_numbers() -> None:
    nan = torch.tensor([float("nan"), 1.0], dtype=torch.float16)
    assert equal_bits(nan, nan.clone())
    assert not equal_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert equal_bits((nan, torch.zeros(3)), (nan, torch.zeros(5))), "statistics depend on the tile"


# ---- kernels compiled ahead ----------------------------------------------------------------------------------------

triton = pytest.importorskip("triton", reason="triton has no wheel for this platform")
compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")


@pytest.fixture
def without_a_card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """triton believes that there is an H100; nothing can be launched on it."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr("hqc.kernels.launch.check_devices", lambda *_: None)
    try:
        with pretended_card():
            yield
    finally:
        for name in ("int_gemm", "int_conv2d", "epilogue"):
            module = importlib.import_module(f"hqc.kernels.jit.{name}")
            function = getattr(module, name, None) or module.sum_splits
            function.device_caches.clear()


def jobs_of(run: Callable[[], Any], tile: ProductTile) -> list[KernelJob]:
    """What a launch would compile."""
    with force(tile), instead_of_launching() as jobs:
        run()
    return jobs


@compiles
def test_a_launch_finds_what_was_compiled_ahead(without_a_card: None) -> None:
    from triton import knobs

    def run() -> Any:
        return int_gemm(*gemm_arguments())

    (job,) = jobs_of(run, TILE)
    assert (job.module, job.function, job.options["num_warps"]) == ("hqc.kernels.jit.int_gemm", "int_gemm", 4)
    assert job.key() == jobs_of(run, TILE)[0].key() != jobs_of(run, replace(TILE, rows=32))[0].key()
    assert compile_job(job) == ""
    hits: list[bool] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda **told: hits.append(told["cache_hit"])
    try:
        with force(TILE), pytest.raises(AttributeError):  # there is nothing to launch on
            run()
    finally:
        knobs.compilation.listener = before
    assert hits == [True]


@compiles
def test_both_kernels_of_a_split_product_are_compiled_ahead(without_a_card: None) -> None:
    jobs = jobs_of(lambda: int_gemm(*gemm_arguments()), replace(TILE, splits=2))
    assert [job.function for job in jobs] == ["int_gemm", "sum_splits"]
    weight = Weight(torch.ones(16, 3, 3, 16, dtype=torch.int8), torch.ones(16))
    codes = torch.ones(1, 4, 4, 16, dtype=torch.int8)
    (conv,) = jobs_of(lambda: int_conv2d(codes, weight, torch.ones(1)), TILE)
    assert conv.constants
    assert conv.function == "int_conv2d"


@compiles
def test_what_cannot_be_compiled_is_a_reason(without_a_card: None) -> None:
    (job,) = jobs_of(lambda: int_gemm(*gemm_arguments()), TILE)
    spoiled = replace(job, constants={})
    assert compile_job(spoiled).startswith("triton cannot compile it: ")
    with pytest.raises(KernelError):
        jobs_of(lambda: int_gemm(*gemm_arguments()), replace(TILE, rows=48))


@compiles
@pytest.mark.slow
def test_processes_compile_each_kernel_once(without_a_card: None, tmp_path: Path) -> None:
    (job,) = jobs_of(lambda: int_gemm(*gemm_arguments()), TILE)
    with compilers() as workers:
        begun = workers.submit(job)
        assert workers.submit(job) is begun
        assert answer(begun) == ""
        assert answer(workers.submit(replace(job, constants={}))).startswith("triton cannot compile it: ")
        kept = list((tmp_path / "triton").rglob("*.cubin"))
        assert len(kept) == 1
        for process in list(workers._pool._processes.values()):
            process.kill()
        assert answer(workers.submit(replace(job, constants={(0,): 0}))) == ""
        assert answer(workers.submit(replace(job, constants={(0,): 1}))) == "", "the launch will compile it"


def test_a_report_without_measurements_is_plain_data() -> None:
    assert TuningReport(Path("x")).to_dict()["us_after"] == 0
