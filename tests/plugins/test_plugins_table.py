"""plugins.json: which PTX is loaded for a GPU, and every way in which it can be wrong."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqc.plugins.hqc_qdp import table
from hqc.plugins.hqc_qdp.problems import MissingError, PluginError
from hqc.plugins.hqc_qdp.table import choose_arch, read_table

KEY = "Int4Linear fp16 channels=64 outputs=96 block=32"
PTX = b".version 8.0\n.target sm_80\n"


def _build(file: str = "k_sm80.ptx", **changes: Any) -> dict[str, Any]:
    build = {"file": file, "sha256": hashlib.sha256(PTX).hexdigest(), "entry": "k", "target": "sm_80"}
    return {**build, "ptx_isa": "8.0", "shared_bytes": 512, **changes}


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """folder(archs): a folder of one kernel; `changes` replaces keys of plugins.json."""

    def write(archs: dict[str, Any] | None = None, **changes: Any) -> Path:
        kernel = {"tile": [64, 32], "num_warps": 4, "parameters": 12, "archs": archs or {"sm_80": _build()}}
        data = {"format": "hqc-plugins", "version": 3, "kernels": {"k": kernel}, "variants": {KEY: ["k"]}, **changes}
        (tmp_path / "plugins.json").write_text(json.dumps(data), encoding="utf-8")
        (tmp_path / "k_sm80.ptx").write_bytes(PTX)
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(table, "driver_cuda", lambda: None)


def test_a_kernel_is_read_for_its_gpu(folder: Callable[..., Path]) -> None:
    found = read_table(folder(), (8, 0))
    assert found.arch == "sm_80"
    (kernel,) = found.tactics(KEY)
    assert (kernel.entry, kernel.ptx, kernel.tile, kernel.threads, kernel.shared_bytes) == (
        "k",
        PTX,
        (64, 32),
        128,
        512,
    )


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_86"),
        ((8, 7), "sm_86"),
        ((9, 0), "sm_90"),
        ((10, 3), "sm_86"),
        ((12, 0), "sm_86"),
    ],
)
def test_a_gpu_takes_its_own_ptx_or_the_newest_that_is_not_bound_to_a_chip(
    capability: tuple[int, int], arch: str
) -> None:
    assert choose_arch({"sm_80": "sm_80", "sm_86": "sm_86", "sm_90": "sm_90a"}, capability, "here") == arch


@pytest.mark.parametrize(
    ("isa", "cuda", "loads"),
    [
        ("8.0", (12, 0), True),
        ("8.4", (12, 3), False),
        ("8.7", (12, 8), True),
        ("9.4", (13, 0), False),
        ("9.4", (13, 4), True),
    ],
)
def test_ptx_that_the_driver_cannot_load_is_refused_before_a_build(
    isa: str, cuda: tuple[int, int], loads: bool, folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = folder({"sm_80": _build(ptx_isa=isa)})
    monkeypatch.setattr(table, "driver_cuda", lambda: cuda)
    if loads:
        assert read_table(place, (8, 0)).tactics(KEY)
        return
    with pytest.raises(
        MissingError, match=rf"PTX {isa} needs a driver for CUDA .* this one serves {cuda[0]}\.{cuda[1]}"
    ):
        read_table(place, (8, 0))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"format": "other"}, "holds 'other' version 3"),
        (
            {"version": 1},
            "holds 'hqc-plugins' version 1, expected 'hqc-plugins' version 2 or 3. Export the model again.",
        ),
        ({"version": 4}, "holds 'hqc-plugins' version 4"),
        ({"kernels": {}}, "is not what hqc writes"),
        ({"variants": [1]}, "is not what hqc writes"),
        ({"kernels": {"k": {"archs": {"sm_80": {}}}}}, "is not what hqc writes"),
        ({"archs": {"sm_90": _build(target="sm_90a")}}, "holds kernels for sm_90, none for sm_80. Export for sm_80."),
        ({"archs": {"sm_80": _build("../k_sm80.ptx")}}, "names '../k_sm80.ptx', outside its folder"),
        ({"archs": {"sm_80": _build("none.ptx")}}, "none.ptx: cannot be read"),
        (
            {"archs": {"sm_80": _build(sha256="0" * 64)}},
            "k_sm80.ptx: is damaged: its sha256 is not that of plugins.json",
        ),
    ],
)
def test_what_is_wrong_is_said_in_one_line(changes: dict[str, Any], text: str, folder: Callable[..., Path]) -> None:
    place = folder(**changes)
    with pytest.raises(PluginError, match=r"^[^\n]*$") as caught:
        read_table(place, (8, 0))
    assert text in str(caught.value)


def test_what_was_exported_before_there_were_bounds_of_samples_is_read(folder: Callable[..., Path]) -> None:
    assert read_table(folder(version=2), (8, 0)).tactics(KEY)


def test_a_link_is_not_followed(folder: Callable[..., Path], tmp_path: Path) -> None:
    place = folder({"sm_80": _build("link.ptx")})
    (tmp_path / "link.ptx").symlink_to(tmp_path / "k_sm80.ptx")
    with pytest.raises(PluginError, match=r"names 'link\.ptx', outside its folder"):
        read_table(place, (8, 0))


def test_no_kernels_and_no_json(tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"plugins\.json: is missing. Export the model with --plugins qdp"):
        read_table(tmp_path, (8, 0))
    (tmp_path / "plugins.json").write_text("{", encoding="utf-8")
    with pytest.raises(PluginError, match=r"plugins\.json: cannot be read"):
        read_table(tmp_path, (8, 0))
    (tmp_path / "plugins.json").write_text("[]", encoding="utf-8")
    with pytest.raises(PluginError, match=r"plugins\.json: holds a list"):
        read_table(tmp_path, (8, 0))


def test_a_variant_that_was_not_compiled_is_named(folder: Callable[..., Path]) -> None:
    with pytest.raises(PluginError, match="holds no kernel for `Int4Linear fp32"):
        read_table(folder(), (8, 0)).tactics("Int4Linear fp32 channels=64 outputs=96 block=32")
