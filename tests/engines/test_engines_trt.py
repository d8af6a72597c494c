"""Builds with TensorRT, whose libraries cannot be had here: a stand-in module records what it is asked for.

The stand-in takes the calls that TensorRT 10.8 to 11 have, in a real builder process; it says nothing about engines.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import engine_graphs as graphs
import pytest

from hqc.engines import BuildOptions, EngineReport, build_engines, check_request
from hqc.engines import build as build_module
from hqc.engines.cache import check_cache, default_cache
from hqc.engines.gpus import Driver, Gpu
from hqc.engines.requests import BuildRequest
from hqc.engines.trt_worker import HOOKS
from hqc.engines.worker import BuildProblem
from hqc.errors import ArtefactError, ExportError, HqcError, RuntimeMissingError

HOPPER = Driver((13, 0), "580.95.05", (Gpu("NVIDIA H200", (9, 0), 140 * 2**30),))

MODULE = """
import enum, json, os
from pathlib import Path

__version__ = "10.16.1.11"


def said(what):
    with open(os.environ["STAND_IN_LOG"], "a") as file:
        file.write(json.dumps(what) + "\\n")


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1
class ProfilingVerbosity(enum.Enum):
    DETAILED = 2
class BuilderFlag(enum.Enum):
    TF32 = 1
class MemoryPoolType(enum.Enum):
    WORKSPACE = 0
class LayerInformationFormat(enum.Enum):
    ONELINE = 0
class Severity(enum.Enum):
    ERROR = 1
class DataType(enum.Enum):
    HALF = 1


class ILogger:
    def __init__(self):
        pass


class Tensor:
    def __init__(self, name):
        self.name, self.dtype = name, DataType.HALF


class Network:
    num_inputs = num_outputs = 1
    def get_input(self, i):
        return Tensor("x")
    def get_output(self, i):
        return Tensor("y")


class Cache:
    def __init__(self, data):
        self.data = bytes(data)
    def serialize(self):
        return self.data + b"+timings"


class Config:
    cache = None
    def clear_flag(self, flag):
        said(["clear", flag.name])
    def set_memory_pool_limit(self, pool, size):
        said([pool.name, size])
    def create_timing_cache(self, data):
        return Cache(data)
    def set_timing_cache(self, cache, ignore_mismatch):
        self.cache = cache
        said(["timings", cache.data.decode()])
        return not cache.data.startswith(b"other")
    def get_timing_cache(self):
        return self.cache
    def add_optimization_profile(self, profile):
        return 0


class Profile:
    def set_shape(self, name, low, usual, high):
        said(["shape", name, low, usual, high])


class Builder:
    def __init__(self, logger):
        self.logger = logger
    def create_network(self, flags):
        said(["flags", flags])
        return Network()
    def create_builder_config(self):
        return Config()
    def create_optimization_profile(self):
        return Profile()
    def build_serialized_network(self, network, config):
        if "STAND_IN_FAILS" in os.environ:
            self.logger.log(Severity.ERROR, "Error Code 10: could not find\\nany implementation")
            return None
        return b"plan"


class OnnxParser:
    def __init__(self, network, logger):
        pass
    def parse_from_file(self, path):
        said(["parse", Path(path).name])
        return True


class Inspector:
    execution_context = None
    def get_engine_information(self, form):
        assert self.execution_context.shapes["x"] == (2, 64, 8, 8)
        return ("Layers:\\nName: c, LayerType: CaskConvolution, Inputs: [ { Name: q, Location: Device, Dimensions: "
                "[2,64,8,8], Format/Datatype: INT8 format }], Outputs: [], Metadata: [ONNX Layer: block.conv1.0/Conv]"
                "\\n\\nBindings:")


class Context:
    def __init__(self):
        self.shapes = {}
    def set_input_shape(self, name, shape):
        self.shapes[name] = shape


class Engine:
    create_engine_inspector = Inspector
    create_execution_context = Context


class Runtime:
    def __init__(self, logger):
        pass
    def deserialize_cuda_engine(self, plan):
        return Engine()
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[list[object]]]:
    """A tensorrt 10.16 on the path and an H200 in the machine; called, it gives what the module was asked for."""
    packages, log = tmp_path / "packages", tmp_path / "asked.jsonl"
    (packages / "tensorrt").mkdir(parents=True)
    (packages / "tensorrt" / "__init__.py").write_text(MODULE)
    facts = packages / "tensorrt-10.16.1.11.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: tensorrt\nVersion: 10.16.1.11\n")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("STAND_IN_LOG", str(log))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(build_module, "find_driver", lambda: HOPPER)
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def build(folder: Path, **options: object) -> EngineReport:
    return build_engines(graphs.save_export(folder, graphs.conv_model()), "trt", **options)  # type: ignore[arg-type]


def test_a_build_for_the_card_that_is_here(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    (engine,) = build(tmp_path / "x", options=BuildOptions(workspace_bytes=2**30, tf32=False)).engines
    assert stand_in() == [
        ["flags", 2],  # 1 << STRONGLY_TYPED
        ["parse", "model.onnx"],
        ["clear", "TF32"],
        ["WORKSPACE", 2**30],
        ["timings", ""],
        ["shape", "x", [1, 64, 8, 8], [2, 64, 8, 8], [8, 64, 8, 8]],
        ["shape", "timestep", [1], [2], [8]],
    ]
    assert (engine.record.name, engine.record.arch) == ("trt_sm90", "sm_90")
    assert (tmp_path / "x" / "engine_trt_sm90.plan").read_bytes() == b"plan"
    assert engine.layers[0].kind == "CaskConvolution"
    assert engine.layers[0].inputs[0].dtype == "Int8"


def test_timings_are_kept_apart_from_engines(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    build(tmp_path / "x")
    timings = default_cache() / "timing_sm90_10.16.1.11.cache"
    assert timings.is_relative_to(tmp_path)
    assert timings.read_bytes() == b"+timings"
    again = build(tmp_path / "y", options=BuildOptions(workspace_bytes=1))  # another key: built, with the timings
    assert not again.engines[0].cached
    assert ["timings", "+timings"] in stand_in()
    asked = len(stand_in())
    assert build(tmp_path / "z").engines[0].cached
    assert len(stand_in()) == asked


def test_timings_of_another_card(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    check_cache(default_cache())
    (default_cache() / "timing_sm90_10.16.1.11.cache").write_bytes(b"other")
    with pytest.raises(ExportError, match=r"refuses \(timing cache\): .*timing_sm90.* is of another card or version"):
        build(tmp_path / "x")


def test_what_the_builder_says_when_it_fails(
    tmp_path: Path, stand_in: Callable[[], list[list[object]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN_FAILS", "1")
    said = r"TensorRT 10\.16\.1\.11 refuses \(build\): Error Code 10: could not find any implementation"
    with pytest.raises(ExportError, match=said):
        build(tmp_path / "x")
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        *("manifest.json", "model.onnx", "plan.json", "report.json")
    ]


def test_another_card_than_the_one_here(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    with pytest.raises(ExportError, match=r"architecture sm_80: the GPU here \(NVIDIA H200\) is sm_90"):
        build(tmp_path / "x", archs=("sm_90", "sm_80"))
    assert stand_in() == []


@pytest.mark.parametrize("driver", [None, Driver((13, 0), "", ())], ids=["no driver", "no GPU"])
def test_no_gpu(stand_in: object, monkeypatch: pytest.MonkeyPatch, driver: Driver | None) -> None:
    monkeypatch.setattr(build_module, "find_driver", lambda: driver)
    with pytest.raises(RuntimeMissingError, match="builder trt: there is no NVIDIA GPU here"):
        check_request("trt")


def test_the_architectures_of_rtx_are_those_of_the_cards_here(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = (Gpu("H200", (9, 0), 1), Gpu("L4", (8, 9), 1), Gpu("L4", (8, 9), 1))
    monkeypatch.setattr(build_module, "find_driver", lambda: Driver((13, 0), "", cards))
    monkeypatch.setattr("hqc.engines.builders.Builder.installed", lambda self: "1.7")
    assert check_request("rtx")[2] == ("sm_89",)
    assert check_request("rtx", ("sm_120",))[2] == ("sm_120",)
    monkeypatch.setattr(build_module, "find_driver", lambda: None)
    assert check_request("rtx")[2] == ("sm_80", "sm_86", "sm_89", "sm_120")


def test_the_plugins_of_the_folder_are_registered_if_the_model_has_some(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Path] = []
    monkeypatch.setattr("hqc.plugins.register", registered.append, raising=False)
    request = BuildRequest("exports/a/model.onnx", "m.plan", "log", "sm_90", {})
    HOOKS.prepare(None, request)
    assert registered == []
    HOOKS.prepare(None, replace(request, plugins=True))
    assert registered == [Path("exports/a")]


def test_plugin_nodes_without_their_kernels(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    folder = graphs.save_export(tmp_path / "x", graphs.plugin_model())
    with pytest.raises(ArtefactError, match=r"holds plugin nodes \(HadamardQuantize\) and no plugins/ with their"):
        build_engines(folder, "trt")
    assert stand_in() == []


def test_plugins_that_cannot_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(export: Path) -> None:
        raise ArtefactError(str(export), "holds no kernels for sm_90", "Export it again.")

    monkeypatch.setattr("hqc.plugins.register", refuse, raising=False)
    with pytest.raises(BuildProblem, match=r"exports/a: holds no kernels for sm_90\. Export it again\.") as raised:
        HOOKS.prepare(None, BuildRequest("exports/a/model.onnx", "m.plan", "log", "sm_90", {}, plugins=True))
    assert raised.value.step == "plugins"


# ---- what is missing -----------------------------------------------------------------------------------------------


def hide(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    monkeypatch.setattr("hqc.engines.builders.package_version", versions.get)


@pytest.mark.parametrize(("builder", "line"), [("rtx", r"pip install 'hqc\[rtx\]'"), ("trt", "pip install tensorrt ")])
def test_a_package_that_is_not_installed(monkeypatch: pytest.MonkeyPatch, builder: str, line: str) -> None:
    hide(monkeypatch)
    with pytest.raises(RuntimeMissingError, match=rf"builder {builder}: tensorrt.* is not installed\. Run `{line}"):
        check_request(builder)


def test_a_package_that_is_too_old(monkeypatch: pytest.MonkeyPatch, stand_in: object) -> None:
    hide(monkeypatch, tensorrt="10.7.0")
    with pytest.raises(RuntimeMissingError, match=r"tensorrt 10\.7\.0 is older than 10\.8"):
        check_request("trt")


def test_architectures_are_refused_before_the_package_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    hide(monkeypatch)
    with pytest.raises(ExportError, match="TensorRT-RTX builds for"):
        check_request("rtx", ("sm_90",))


def test_a_package_that_cannot_be_imported(tmp_path: Path, stand_in: object) -> None:
    module = tmp_path / "packages" / "tensorrt" / "__init__.py"
    module.write_text("raise ImportError('libnvinfer.so.10: cannot open shared object file')")
    with pytest.raises(HqcError, match=r"refuses \(import\): tensorrt cannot be imported \(libnvinfer\.so\.10"):
        build(tmp_path / "x")


def test_a_cache_that_cannot_be_written(tmp_path: Path, stand_in: Callable[[], list[list[object]]]) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtefactError, match=r"engine cache .*/file/cache: cannot be written \(.*\)\. Give a writable"):
        build(tmp_path / "x", cache=tmp_path / "file" / "cache")
    assert stand_in() == []


def test_the_stand_in_is_not_the_real_module(stand_in: object) -> None:
    assert "tensorrt" not in sys.modules, "another test imported it: the builds above would say nothing"
