"""The quickly deployable plugins against a small stand-in for TensorRT: signatures, combinations, launches."""

import importlib
import sys
from collections.abc import Iterator

import fake_tensorrt as fake
import numpy as np
import pytest

from hqc.errors import ArtefactError, RuntimeMissingError
from hqc.plugins import hqc_qdp, register
from hqc.plugins.hqc_qdp.current import CURRENT
from hqc.plugins.hqc_qdp.nodes import OPS
from hqc.plugins.hqc_qdp.problems import MissingError, PluginError
from hqc.plugins.hqc_qdp.table import Kernel

PACKAGE = "hqc.plugins.hqc_qdp"
HALF, REAL, CODE = fake.DataType.HALF, fake.DataType.FLOAT, fake.DataType.INT8
LINEAR, HWC8, HWC16 = fake.TensorFormat.LINEAR, fake.TensorFormat.HWC8, fake.TensorFormat.HWC16
TILES = ((64, 64), (16, 32))


class Kernels:
    """Two tactics for every variant; the first knows its key."""

    def tactics(self, key: str) -> tuple[Kernel, ...]:
        return tuple(Kernel(f"k{i}", f"{key} {i}", b"ptx%d" % i, "sm_80", TILES[i], 4, 512 * i, 9) for i in range(2))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[fake.Registry]:
    """TensorRT's registry after hqc's plugins have registered themselves in it."""
    modules, registry = fake.modules()
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(hqc_qdp._Registered, "done", False)
    monkeypatch.setattr(CURRENT, "kernels", None)
    hqc_qdp.register_kernels(Kernels())
    yield registry
    for name in ("quick", "trt_types"):
        sys.modules.pop(f"{PACKAGE}.{name}", None)


def ints(*values: int) -> list[np.ndarray]:
    return [np.array([value], np.int32) for value in values]


def image(layout: fake.TensorFormat) -> list[fake.TensorDesc]:
    return [fake.TensorDesc((3, 64, 9, 7), HALF, layout), fake.TensorDesc((3,), REAL)]


def test_all_nodes_are_registered_once(registry: fake.Registry) -> None:
    assert sorted(registry.functions) == [f"hqc::{name}" for name in sorted(OPS)]
    assert len(OPS) == 4
    assert all(set(kinds) == {"register", "autotune", "aot_impl"} for kinds in registry.functions.values())
    hqc_qdp.register_kernels(Kernels())  # the fake refuses a name that it has


def test_an_image_has_two_ways_with_two_tactics_each(registry: fake.Registry) -> None:
    tune = registry.functions["hqc::HadamardQuantize"]["autotune"]
    found = tune(*image(LINEAR), *ints(32, -7, 7, 1, 0), ())
    assert [(c.io_types, c.layouts, c.tactics) for c in found] == [
        ("FP16, FP32, INT8", "LINEAR, LINEAR, HWC16", [1, 2]),
        ("FP16, FP32, INT8", "HWC8, LINEAR, HWC16", [1, 2]),
    ]


@pytest.mark.parametrize(
    ("layout", "tactic", "name", "integers", "grid"),
    [
        (LINEAR, 1, "nchw", [64, 63], (1, 1, 3)),
        (LINEAR, 2, "nchw", [64, 63], (2, 4, 3)),
        (HWC8, 1, "nhwc", [189, 64, 63], (3, 1, 1)),
        (HWC8, 2, "nhwc", [189, 64, 63], (12, 2, 1)),
    ],
)
def test_the_formats_decide_on_the_kernel_and_the_tactic_on_its_tile(
    layout: fake.TensorFormat,
    tactic: int,
    name: str,
    integers: list[int],
    grid: tuple[int, int, int],
    registry: fake.Registry,
) -> None:
    function = registry.functions["hqc::HadamardQuantize"]["aot_impl"]
    outputs = (fake.TensorDesc((3, 64, 9, 7), CODE, HWC16),)
    entry, ptx, launch, extra = function(*image(layout), *ints(32, -7, 7, 1, 0), outputs, tactic)
    assert entry.decode() == f"HadamardQuantize fp16 {name} channels=64 block=32 low=-7 high=7 {tactic - 1}"
    assert (ptx, launch.shared_mem, launch.block_x) == (b"ptx%d" % (tactic - 1), 512 * (tactic - 1), 128)
    assert (list(extra), (launch.grid_x, launch.grid_y, launch.grid_z)) == (integers, grid)


def test_bounds_beside_the_scale_take_the_same_ways(registry: fake.Registry) -> None:
    functions = registry.functions["hqc::HadamardQuantizeBounded"]
    operands = [fake.TensorDesc((3, 64, 9, 7), HALF, HWC8), fake.TensorDesc((3, 3), REAL)]
    numbers = ints(32, 1, 0)
    assert [c.layouts for c in functions["autotune"](*operands, *numbers, ())] == [
        "LINEAR, LINEAR, HWC16",
        "HWC8, LINEAR, HWC16",
    ]
    codes = functions["register"](*operands, *numbers)
    assert (codes.shape, codes.dtype) == ((3, 64, 9, 7), CODE)
    outputs = (fake.TensorDesc((3, 64, 9, 7), CODE, HWC16),)
    entry, _, launch, extra = functions["aot_impl"](*operands, *numbers, outputs, 2)
    assert entry.decode() == "HadamardQuantizeBounded fp16 nhwc channels=64 block=32 1"
    assert (list(extra), (launch.grid_x, launch.grid_y, launch.grid_z)) == ([189, 64, 63], (12, 2, 1))


def test_formats_that_were_not_offered_are_refused(registry: fake.Registry) -> None:
    function = registry.functions["hqc::HadamardQuantize"]["aot_impl"]
    outputs = (fake.TensorDesc((3, 64, 9, 7), CODE, LINEAR),)
    with pytest.raises(PluginError, match="asks for formats LINEAR, LINEAR, LINEAR, which were not offered"):
        function(*image(LINEAR), *ints(32, -7, 7, 1, 0), outputs, 1)


def test_a_product_describes_its_output(registry: fake.Registry) -> None:
    describe = registry.functions["hqc::Int4Conv"]["register"]
    operands = [fake.TensorDesc((3, 64, 9, 7), CODE), fake.TensorDesc((96, 288), CODE)]
    operands += [fake.TensorDesc((96,), REAL), fake.TensorDesc((3,), REAL), fake.TensorDesc((96,), REAL)]
    found = describe(*operands, *ints(32, 3, 2, 1, 10, 0))
    assert (found.shape, found.dtype) == ((3, 96, 5, 4), HALF)
    codes = registry.functions["hqc::HadamardQuantize"]["register"](*image(LINEAR), *ints(32, -7, 7, 1, 0))
    assert (codes.shape, codes.dtype) == ((3, 64, 9, 7), CODE)


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_without_tensorrt_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(RuntimeMissingError, match=r"^TensorRT plugins: tensorrt cannot be imported") as caught:
        register(tmp_path)
    assert "\n" not in str(caught.value)


def test_an_old_tensorrt_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, _ = fake.modules(version="8.6.1")
    monkeypatch.setitem(sys.modules, "tensorrt", modules["tensorrt"])
    with pytest.raises(MissingError, match=r"tensorrt 8\.6\.1 is older than 10\.0"):
        hqc_qdp.register_kernels(Kernels())


def test_without_a_driver_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    modules, _ = fake.modules()
    monkeypatch.setitem(sys.modules, "tensorrt", modules["tensorrt"])
    driver = importlib.import_module(f"{PACKAGE}.driver")
    monkeypatch.setattr(driver, "_library", lambda: None)
    with pytest.raises(RuntimeMissingError, match="there is no NVIDIA driver here"):
        register(tmp_path)


def test_a_damaged_export_is_an_artefact_error(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    modules, _ = fake.modules()
    monkeypatch.setitem(sys.modules, "tensorrt", modules["tensorrt"])
    monkeypatch.setattr(hqc_qdp, "current_capability", lambda: (8, 9))
    with pytest.raises(ArtefactError, match=r"plugins\.json: is missing"):
        register(tmp_path)


def test_a_second_copy_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    modules, registry = fake.modules()
    monkeypatch.setitem(sys.modules, "tensorrt", modules["tensorrt"])
    monkeypatch.setattr(hqc_qdp._Registered, "done", False)
    registry.all_creators = [type("Creator", (), {"plugin_namespace": "hqc"})()]
    with pytest.raises(PluginError, match="has hqc's plugins already, from another copy"):
        hqc_qdp.register_kernels(Kernels())


def test_a_network_before_register_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CURRENT, "kernels", None)
    with pytest.raises(PluginError, match=r"no kernels are registered. Call register\(FOLDER\) first"):
        CURRENT.tactics("any")
