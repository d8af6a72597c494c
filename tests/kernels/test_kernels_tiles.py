"""The choice of a product's tile: measured, near a measured one, modelled; tables as files, whole and damaged."""

import json
import math
import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from hqc.errors import ArtefactError
from hqc.kernels.cards import H100, Card, card_of, shared_limit
from hqc.kernels.compile import compile_kernel
from hqc.kernels.options import GemmOptions
from hqc.kernels.products import Product, ProductTile
from hqc.kernels.tile_model import fits, model_candidates, model_nanoseconds, shared_bytes
from hqc.kernels.tiles import product_tile
from hqc.kernels.tuned import Table, Timed, read_table, shipped_table, tiles_cache, write_table

A100 = Card("NVIDIA A100-SXM4-80GB", (8, 0), 108, shared_limit((8, 0)))
L4 = Card("NVIDIA L4", (8, 9), 58, shared_limit((8, 9)))
B200 = Card("NVIDIA B200", (10, 0), 148, shared_limit((10, 0)))
CARDS = (H100, A100, L4, B200)
TABLE = cast(Table, shipped_table(H100))
SHAPES = [
    *((rows, outputs, channels, taps) for rows, outputs, channels, taps in ((8192, 192, 192, 9), (2048, 384, 384, 1))),
    *((2, 768, 192, 1), (6, 40, 3104, 1), (128, 960, 960, 9), (32768, 4, 192, 9), (18, 20, 480, 9)),
    *((77, 45, 3, 9), (1, 1, 1, 1), (4096, 320, 45, 1), (300, 1280, 2560, 9), (8192, 2560, 320, 1)),
]


def tile_for(product: Product, **more: Any) -> ProductTile:
    """`product_tile` of a product as a value."""
    form: dict[str, Any] = {"taps": product.taps, "rotation": product.rotation, "two_digits": product.two_digits}
    return product_tile(product.rows, product.outputs, product.channels, **form, **more)


# ---- the choice ----------------------------------------------------------------------------------------------------


def test_a_measured_product_takes_its_quickest_tile() -> None:
    assert len(TABLE.products) > 60
    for product, timed in TABLE.products.items():
        assert tile_for(product) == timed[0].tile == min(timed, key=lambda t: t.us).tile


@pytest.mark.parametrize(("rows", "outputs", "channels", "taps"), SHAPES)
@pytest.mark.parametrize("card", CARDS, ids=lambda card: card.slug)
def test_every_choice_fits_the_card_and_the_kernel(
    rows: int, outputs: int, channels: int, taps: int, card: Card
) -> None:
    blocks = [b for b in (1, 8, 32, 64, 128, 256) if channels % b == 0]
    for rotation, two_digits in [*((b, False) for b in blocks), (1, True)]:
        product = Product(rows, outputs, channels, taps, rotation, two_digits)
        for unsplit in (False, True):
            tile = tile_for(product, card=card, unsplit=unsplit)
            form = {"form": "words" if channels % 8 == 0 else "nibbles", "even": False, "rotation": rotation}
            GemmOptions(
                tile_rows=tile.rows,
                tile_outputs=tile.outputs,
                tile_channels=tile.channels,
                num_warps=tile.num_warps,
                num_stages=tile.num_stages,
                **({"two_digits": True} if two_digits else form if rotation > 1 else {}),
            )
            assert fits(product, tile, card, unsplit=unsplit)
            assert shared_bytes(product, tile) <= card.shared_bytes
            assert tile.splits == 1 or not unsplit


@pytest.mark.parametrize("per_sample", [4096, 1024, 64, 48, 16, 1])
def test_tiles_lie_in_one_sample_where_any_can(per_sample: int) -> None:
    for channels in (192, 960):
        tile = product_tile(8 * per_sample, 384, channels, taps=9, whole_rows=per_sample)
        assert per_sample % tile.rows == 0 or per_sample in (48, 16, 1)
    measured = Product(512, 960, 960, 9)
    assert tile_for(measured).rows == 64
    assert tile_for(Product(2048, 576, 1152, 9), whole_rows=64).rows == 64


def test_two_measured_shapes_speak_for_those_beside_them() -> None:
    """A batch of 31 takes a tile that was measured at 32; a batch of 20 is not near, and is modelled."""
    at_32 = {timed.tile for timed in TABLE.products[Product(131072, 192, 192, 9)]}
    assert product_tile(31 * 4096, 192, 192, taps=9) in at_32
    usable = partial(fits, Product(20 * 4096, 192, 192, 9), card=H100)
    model = partial(model_nanoseconds, card=H100)
    assert TABLE.near(Product(20 * 4096, 192, 192, 9), usable, model) is None
    assert TABLE.near(Product(131072, 192, 192, 9, two_digits=True), usable, model) is None


def test_the_users_measurements_come_first() -> None:
    product, tile = Product(8192, 192, 192, 9), ProductTile(64, 32, 64, 4, 3, 2)
    tuned = Table(H100, {product: (Timed(1.0, tile),)})
    assert tile_for(product, tuned=tuned) == tile
    assert tile_for(product, tuned=tuned, card=A100) == tile
    assert tile_for(product, tuned=tuned, unsplit=True).splits == 1
    assert tile_for(product, tuned=Table(H100, {})) == tile_for(product)
    assert tile_for(replace(product, rows=8190), tuned=tuned) != tile, "of this very product"
    huge = Table(H100, {product: (Timed(1.0, ProductTile(256, 256, 128, 8, 8)),)})
    assert tile_for(product, tuned=huge) == tile_for(product), "past the shared memory"


def test_a_card_of_the_same_chip_takes_the_table() -> None:
    h200 = replace(H100, name="NVIDIA H200")
    assert shipped_table(h200) is TABLE
    assert shipped_table(replace(H100, name="NVIDIA H100 PCIe", multiprocessors=114)) is None
    assert shipped_table(A100) is None


def test_the_model_is_fitted_to_what_was_measured() -> None:
    """In sum within 15 % of the best tile, over tiles whose times are known; it counts the tile it would take."""
    chosen = best = 0.0
    for product, timed in TABLE.products.items():
        usable = partial(fits, product, card=H100)
        # The sweep tried splits of 1 and 3 only: what others take is not known.
        tiles = [t for t in model_candidates(product, H100) if usable(t) and t.splits in (1, 3)]
        tile = min(tiles, key=lambda t: model_nanoseconds(product, t, H100))
        same = [t.us for t in timed if replace(t.tile, num_stages=tile.num_stages) == tile]
        chosen += same[0] if same else 1.1 * timed[-1].us
        best += timed[0].us
    assert chosen / best < 1.05
    assert best < 4000, "microseconds, of all products once"


def test_the_models_times_are_near_the_measured_ones() -> None:
    off = [
        abs(math.log(model_nanoseconds(product, timed.tile, H100) / 1000 / timed.us))
        for product, all_of_them in TABLE.products.items()
        for timed in all_of_them
        if timed.tile in set(model_candidates(product, H100))
    ]
    assert len(off) > 150
    assert sum(off) / len(off) < 0.12


def test_a_smaller_card_splits_less() -> None:
    few = Product(128, 320, 960, 9)
    assert tile_for(few, card=replace(H100, name="small", multiprocessors=8)).splits < tile_for(few).splits


def test_the_card_of_a_cpu_is_assumed() -> None:
    assert card_of(torch.device("cpu")) is H100
    assert Card("NVIDIA GeForce RTX 4090", (8, 9), 128, 1).slug == "nvidia-geforce-rtx-4090"
    assert Card("///", (8, 9), 128, 1).slug == "card"


# ---- what the assembler makes of the tiles -------------------------------------------------------------------------

COMPILED: list[tuple[str, Product, ProductTile]] = [
    ("sm_90", Product(32768, 192, 192, 9), ProductTile(256, 64, 64, 8, 4)),
    ("sm_90", Product(32768, 384, 384, 9), ProductTile(128, 128, 128, 4, 3)),
    ("sm_90", Product(8192, 3072, 384), ProductTile(128, 128, 64, 4, 3)),
    ("sm_90", Product(8192, 384, 384), ProductTile(64, 128, 128, 4, 3)),
]


def _compiled() -> Iterator[Any]:
    for arch, product, tile in COMPILED:
        yield pytest.param(arch, product, tile, id=f"{arch}-{tile.rows}-{tile.outputs}-{tile.channels}")
    for arch, card in (("sm_80", A100), ("sm_100", B200)):
        for rotation, two_digits in ((1, False), (32, False), (1, True)):
            product = Product(32768, 384, 384, 9, rotation, two_digits)
            yield pytest.param(arch, product, tile_for(product, card=card), id=f"{arch}-{rotation}-{two_digits}")


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets kernels")
@pytest.mark.parametrize(("arch", "product", "tile"), list(_compiled()))
def test_tiles_stay_in_registers(
    arch: str, product: Product, tile: ProductTile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton", reason="triton has no wheel for this platform")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    form = {"form": "words", "rotation": product.rotation} if product.rotation > 1 else {}
    options = {
        "tile_rows": tile.rows,
        "tile_outputs": tile.outputs,
        "tile_channels": tile.channels,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "two_digits": product.two_digits,
        **form,
    }
    compiled = compile_kernel("int_conv2d" if product.taps > 1 else "int_gemm", "fp16", options, arch)
    assert compiled.spills == 0
    assert compiled.shared_bytes <= shared_bytes(product, tile)


# ---- files ---------------------------------------------------------------------------------------------------------


def test_a_table_is_the_same_after_a_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "tiles.json"
    write_table(path, TABLE)
    again = read_table(path)
    assert again == TABLE
    assert [p.name for p in path.parent.iterdir()] == ["tiles.json"]
    assert TABLE.made["date"] == "2026-11-27"
    assert tiles_cache().parts[-2:] == ("hqc", "tiles")


def test_what_is_measured_anew_ships() -> None:
    """A product's new tiles take the place of the old ones, others stay, and the table says what came from where."""
    from ship_tiles import merged

    one, two, tile = Product(64, 64, 64), Product(128, 64, 64), ProductTile(64, 64, 64, 4, 3)
    old = Table(H100, {one: (Timed(2.0, tile),), two: (Timed(3.0, tile),)}, {"date": "2026-01-01", "method": "a sweep"})
    new = Table(H100, {one: (Timed(1.0, tile),)}, {"date": "2026-02-02", "torch": "2.11", "kernels": "abc"})
    both = merged(old, new)
    assert both.products == {one: (Timed(1.0, tile),), two: (Timed(3.0, tile),)}
    assert both.made["date"] == "2026-02-02"
    assert both.made["method"] == "1 products by hqc tune on 2026-02-02; the others: a sweep"
    assert "kernels" not in both.made, "a shipped table is never stale"
    assert merged(None, new) is new


def damaged(**changes: Any) -> dict[str, Any]:
    """A small table as data, with changes to its only product, or to the file."""
    tile = changes.pop("tile", [5.0, 64, 64, 64, 4, 3, 1])
    product = {"rows": 8, "outputs": 8, "channels": 64, "taps": 1, "rotation": 1, "two_digits": False}
    product |= {name: changes.pop(name) for name in list(changes) if name in product}
    card = {"name": "card", "capability": [9, 0], "multiprocessors": 132}
    return {"format": 1, "card": card, "made": {}, "products": [product | {"tiles": [tile]}]} | changes


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (damaged(format=2), "format 2, expected 1"),
        ([], "format None"),
        (damaged(card={}), "no 'capability'"),
        (damaged(made=None), "damaged"),
        (damaged(rows=0), "rows is 0"),
        (damaged(rows="8"), "rows is '8'"),
        (damaged(two_digits=1), "two_digits is 1"),
        (damaged(tile=[5.0, 48, 64, 64, 4, 3, 1]), "a tile is"),
        (damaged(tile=[5.0, 64, 64, 64, 4, 0, 1]), "a tile has 0"),
        (damaged(tile=[5.0, 64, 64, 64, 4, 3, 4096]), "a tile is"),
        (damaged(tile=[-1, 64, 64, 64, 4, 3, 1]), "a time is -1"),
        (damaged(tile=[math.nan, 64, 64, 64, 4, 3, 1]), "a time is nan"),
        (damaged(tile=[5.0, 64, 64]), "damaged"),
        (damaged(tile=7), "damaged"),
    ],
    ids=lambda value: "" if isinstance(value, dict | list) else value,
)
def test_damaged_tables_are_refused(data: Any, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ArtefactError, match=reason) as error:
        read_table(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "\x00"], ids=["empty", "cut", "deep", "binary"])
def test_what_is_no_json_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "tiles.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ArtefactError, match="is damaged"):
        read_table(path)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"cannot be read \(No such file or directory\)"):
        read_table(tmp_path / "none.json")
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ArtefactError, match="cannot be written"):
        write_table(tmp_path / "file" / "tiles.json", TABLE)
