"""The `tensorrt` runtime without a GPU: which plan is taken, what is refused and in which words, and how it is called.

`fake_trt` stands in for TensorRT; it reads and writes at the addresses that it is given.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import diffusers.configuration_utils  # noqa: F401  (before torch is told that it has CUDA)
import fake_trt
import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from hqc.cli import main
from hqc.commands.asking import Asked
from hqc.engines import builders
from hqc.engines.gpus import Driver, Gpu
from hqc.engines.options import BatchProfile, BuildOptions
from hqc.engines.record import EngineRecord, build_text, engine_name, folder_digest
from hqc.errors import ArtefactError, EvaluationError, HqcError, RuntimeMissingError
from hqc.plan import QuantPlan
from hqc.runtimes import load
from hqc.runtimes.trt import engine as engine_module
from hqc.runtimes.trt import plans, session
from hqc.runtimes.trt.engine import Engine
from hqc.runtimes.trt.plans import PlanOptions
from hqc.runtimes.trt.session import TensorRtSession
from hqc.storage import write_manifest

SAMPLE = [3, 4, 4]
PLAN: dict[str, Any] = {
    "inputs": {"sample": ["FLOAT", [-1, *SAMPLE]], "timestep": ["FLOAT", [-1]]},
    "outputs": {"output": ["FLOAT", [-1, *SAMPLE]]},
    "batches": [1, 2, 8],
}
INPUTS = [
    {"name": "sample", "shape": ["N", *SAMPLE], "dtype": "float32", "span": None},
    {"name": "timestep", "shape": ["N"], "dtype": "float32", "span": None},
]
TRT_VERSION, RTX_VERSION = "10.16.1.11", "1.7.1.116"


@dataclass
class Machine:
    """What there is on the machine that a test pretends to run on."""

    gpus: tuple[Gpu, ...] = (Gpu("NVIDIA L4", (8, 9), 2**34),)
    driver: bool = True
    cuda: bool = True
    packages: dict[str, str] = field(default_factory=lambda: {"tensorrt": TRT_VERSION})
    graphs: list[int] = field(default_factory=list)
    engines: list[fake_trt.Engine] = field(default_factory=list)


class Plain:
    """Calls an execution a batch size, at once."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.executions = engine, {}

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        batch = self.engine.batch_of(inputs)
        if batch not in self.executions:
            self.executions[batch] = self.engine.execution(batch, "output")
        return self.executions[batch](*inputs)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """One with an L4 and TensorRT 10.16; tests change it before they open a session. Everything runs on the CPU."""
    here = Machine()
    monkeypatch.setattr(plans, "find_driver", lambda: Driver((13, 0), "580.1", here.gpus) if here.driver else None)
    monkeypatch.setattr(builders, "package_version", here.packages.get)
    monkeypatch.setattr(builders, "find_spec", lambda module: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: here.cuda)
    monkeypatch.setattr(session, "_device", lambda index: torch.device("cpu"))
    monkeypatch.setattr(engine_module, "current_stream", lambda device: 7)
    monkeypatch.setattr(session, "runner", lambda engine, graphs: here.graphs.append(graphs) or Plain(engine))
    for name, version in (("tensorrt", TRT_VERSION), ("tensorrt_rtx", RTX_VERSION)):
        module, loaded = fake_trt.module(version)
        here.engines = loaded if name == "tensorrt" else here.engines
        monkeypatch.setitem(sys.modules, name, module)
    return here


def record(folder: Path, plan: dict[str, Any], arch: str, builder: str, **changes: Any) -> EngineRecord:
    """Writes a plan and says what build.json says of it."""
    file = f"engine_{engine_name(builder, arch)}.plan"
    data = json.dumps(plan).encode()
    (folder / file).write_bytes(data)
    facts: dict[str, Any] = {
        "file": file,
        "builder": builder,
        "builder_version": {"trt": TRT_VERSION, "rtx": RTX_VERSION}[builder],
        "arch": arch,
        "onnx": folder_digest(folder),
        "key": "k",
        "options": BuildOptions(BatchProfile(*plan["batches"])).to_dict(),
        "shapes": {},
        "dtypes": {},
        "sha256": hashlib.sha256(data).hexdigest(),
        "size_bytes": len(data),
        "seconds": 1.0,
        "peak_resident_bytes": 1,
    }
    return EngineRecord(**{**facts, **changes})


Export = Callable[..., Path]


@pytest.fixture
def export(tmp_path: Path) -> Export:
    """export(…): a folder as `hqc export --target tensorrt` writes it, with one engine, for an L4 by TensorRT."""

    def write(
        plan: dict[str, Any] = PLAN,
        *,
        target: str = "tensorrt",
        inputs: list[dict[str, Any]] = INPUTS,
        engines: Sequence[tuple[str, str]] = (("sm_89", "trt"),),
        plugins: bool = False,
        **changes: Any,
    ) -> Path:
        folder = tmp_path / "export"
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"model")
        (folder / "plan.json").write_text(json.dumps(QuantPlan().to_dict()), encoding="utf-8")
        if plugins:
            (folder / "plugins").mkdir()
            (folder / "plugins" / "plugins.json").write_text("{}", encoding="utf-8")
        origin = {"unet_config": {"in_channels": 3, "sample_size": 4}, "pipeline": ""}
        write_manifest(folder, "hqc-export", {"target": target, "inputs": inputs, "origin": origin})
        records = [record(folder, plan, arch, builder, **changes) for arch, builder in engines]
        if records:
            text = build_text({r.name: r for r in records}, {"digest": folder_digest(folder)})
            (folder / "build.json").write_text(text, encoding="utf-8")
        return folder

    return write


def inputs(batch: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, *SAMPLE, generator=generator), torch.arange(1.0, batch + 1)


def expected(sample: Tensor, timestep: Tensor) -> Tensor:
    return 2 * sample + timestep.reshape(-1, 1, 1, 1)


# ---- running -------------------------------------------------------------------------------------------------------


def test_an_engine_is_run_at_every_batch_of_its_profile(machine: Machine, export: Export) -> None:
    found = TensorRtSession(export())
    assert (found.name, found.batches, found.record.arch) == ("tensorrt", (1, 8), "sm_89")
    for batch in (1, 2, 8, 2):
        sample, timestep = inputs(batch)
        assert torch.equal(found(sample, timestep), expected(sample, timestep))
    (engine,) = machine.engines
    assert [context.shapes["sample"][0] for context in engine.contexts] == [1, 2, 8]  # one a batch size, none changed
    assert len({context.memory for context in engine.contexts}) == 1
    assert [len(context.streams) for context in engine.contexts] == [1, 2, 1]
    assert machine.graphs == [8]


def test_inputs_are_used_where_they_lie(machine: Machine, export: Export) -> None:
    found = TensorRtSession(export())
    sample, timestep = inputs(2)
    output = found(sample, timestep)
    addresses = machine.engines[0].contexts[0].addresses
    assert addresses["sample"] == sample.data_ptr()
    assert addresses["output"] == output.data_ptr()
    before = output.clone()
    found(sample + 1, timestep)
    assert torch.equal(output, before)  # the next call writes elsewhere


def test_one_timestep_for_all_and_what_the_engine_does_not_take(machine: Machine, export: Export) -> None:
    extra = {"name": "condition", "shape": ["N", 2], "dtype": "float32", "span": None}
    found = TensorRtSession(export(inputs=[*INPUTS, extra]))
    sample, _ = inputs(3)
    output = found(sample, 5, torch.ones(3, 2))
    assert torch.equal(output, 2 * sample + 5)


def test_a_model_of_one_timestep_a_call_runs_once_for_each(machine: Machine, export: Export) -> None:
    plan = {**PLAN, "inputs": {**PLAN["inputs"], "timestep": ["FLOAT", [1]]}}
    found = TensorRtSession(export(plan))
    sample, _ = inputs(5)
    timestep = torch.tensor([3.0, 7.0, 3.0, 7.0, 7.0])
    assert torch.equal(found(sample, timestep), expected(sample, timestep))
    assert [context.shapes["sample"][0] for context in machine.engines[0].contexts] == [2, 3]


def test_it_is_a_drop_in_for_a_pipelines_unet(machine: Machine, export: Export) -> None:
    unet = TensorRtSession(export()).as_unet()
    sample, _ = inputs(2)
    assert torch.equal(unet(sample, 4).sample, 2 * sample + 4)
    assert (unet.config.in_channels, unet.config.sample_size) == (3, 4)


def test_load_opens_it_and_picks_it_where_it_can_run(machine: Machine, export: Export) -> None:
    folder = export()
    for runtime in (None, "tensorrt"):
        model = load(folder, runtime=runtime)
        assert (model.runtime, model.size_bytes) == ("tensorrt", 5)
        sample, _ = inputs(1)
        assert torch.equal(model.as_unet()(sample, 4).sample, 2 * sample + 4)


@pytest.mark.parametrize("lacking", ["driver", "package"])
def test_load_takes_onnxruntime_where_it_cannot(
    lacking: str, machine: Machine, export: Export, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    monkeypatch.setattr("hqc.runtimes.model.OrtSession", lambda folder, **_: opened.append(folder) or Plain(None))
    monkeypatch.setattr(Plain, "name", "onnxruntime", raising=False)
    folder = export()
    if lacking == "driver":
        machine.driver = False
    else:
        machine.packages.clear()
    assert load(folder).runtime == "onnxruntime"
    assert opened == [folder]


# ---- which plan ----------------------------------------------------------------------------------------------------


def test_tensorrts_plan_comes_before_that_of_rtx(machine: Machine, export: Export) -> None:
    machine.packages["tensorrt-rtx"] = RTX_VERSION
    folder = export(engines=[("sm_89", "rtx"), ("sm_89", "trt"), ("sm_80", "trt")])
    assert TensorRtSession(folder).record.builder == "trt"
    assert TensorRtSession(folder, PlanOptions(builder="rtx")).record.builder == "rtx"
    assert machine.graphs == [8, 0]  # RTX compiles while it runs: no capture


def test_the_plan_of_rtx_is_taken_where_tensorrt_is_not_installed(machine: Machine, export: Export) -> None:
    machine.packages.clear()
    machine.packages["tensorrt-rtx"] = RTX_VERSION
    folder = export(engines=[("sm_89", "rtx"), ("sm_89", "trt")])
    assert TensorRtSession(folder).record.builder == "rtx"


def test_an_engine_is_built_once(machine: Machine, export: Export, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    folder = export(engines=[("sm_80", "trt")])
    built = []

    def build(place: Path, builder: str, archs: Sequence[str], options: BuildOptions, *, cache: Path | None) -> None:
        built.append((place, builder, tuple(archs), options.profile, cache))
        made = record(place, {**PLAN, "batches": [1, 2, 3]}, archs[0], builder)
        (place / "build.json").write_text(build_text({made.name: made}, {}), encoding="utf-8")

    monkeypatch.setattr(plans, "build_engines", build)
    wanted = PlanOptions(profile=BatchProfile(1, 2, 3), cache=folder / "cache")
    for _ in range(2):
        assert TensorRtSession(folder, wanted).batches == (1, 3)
    assert built == [(folder, "trt", ("sm_89",), BatchProfile(1, 2, 3), folder / "cache")]
    assert [r.message for r in caplog.records] == [
        "building an engine with TensorRT for NVIDIA L4, once: this takes minutes"
    ]


def test_rtx_builds_where_tensorrt_is_not_installed(machine: Machine, export: Export, monkeypatch) -> None:
    machine.packages.clear()
    machine.packages["tensorrt-rtx"] = RTX_VERSION
    asked = []

    def build(place: Path, builder: str, archs: Sequence[str], *_: Any, **__: Any) -> None:
        asked.append(builder)
        raise ArtefactError("engine", "is not built here", "Stop.")

    monkeypatch.setattr(plans, "build_engines", build)
    with pytest.raises(ArtefactError, match="is not built here"):
        TensorRtSession(export(engines=[]))
    assert asked == ["rtx"]


# ---- plugins -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ahead_of_time", "plugins", "registers"), [(True, True, 0), (False, True, 1), (False, False, 0)]
)
def test_plugins_are_registered_where_the_engine_does_not_hold_them(
    ahead_of_time: bool,
    plugins: bool,
    registers: int,
    machine: Machine,
    export: Export,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt, _ = fake_trt.module(TRT_VERSION, ahead_of_time=ahead_of_time)
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    registered: list[Path] = []
    monkeypatch.setattr(session, "register", registered.append)
    folder = export(plugins=plugins)
    TensorRtSession(folder)
    assert registered == [folder] * registers


# ---- refusals ------------------------------------------------------------------------------------------------------


def refused(error: type[HqcError], text: str, folder: Path, options: PlanOptions | None = None) -> str:
    """The message, which is one line."""
    with pytest.raises(error) as caught:
        TensorRtSession(folder, options)
    message = str(caught.value)
    assert text in message
    assert "\n" not in message
    return message


def test_without_a_driver_a_gpu_or_cuda(machine: Machine, export: Export) -> None:
    folder = export()
    machine.cuda = False
    refused(
        RuntimeMissingError, "runtime tensorrt: this torch was built without CUDA. Use runtime='onnxruntime'", folder
    )
    machine.gpus = ()
    refused(RuntimeMissingError, "runtime tensorrt: the driver finds no GPU here", folder)
    machine.driver = False
    refused(RuntimeMissingError, "runtime tensorrt: there is no NVIDIA driver here", folder)


def test_a_gpu_that_is_not_there(machine: Machine, export: Export) -> None:
    with pytest.raises(RuntimeMissingError, match="there is no GPU 1; there are 1"):
        TensorRtSession(export(), device=1)


def test_without_the_package(machine: Machine, export: Export) -> None:
    machine.packages.clear()
    message = refused(RuntimeMissingError, "runtime tensorrt: tensorrt is not installed. Run `pip install", export())
    assert "pypi.nvidia.com" in message


def test_without_any_plan_or_package(machine: Machine, export: Export) -> None:
    machine.packages.clear()
    refused(RuntimeMissingError, "runtime tensorrt: tensorrt is not installed", export(engines=[]))


def test_a_package_that_cannot_be_imported(machine: Machine, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused(RuntimeMissingError, "runtime tensorrt: tensorrt cannot be imported", export())


def test_a_card_and_an_export_that_nothing_here_builds_for(machine: Machine, export: Export) -> None:
    machine.packages.clear()
    machine.packages["tensorrt-rtx"] = RTX_VERSION
    machine.gpus = (Gpu("NVIDIA H200", (9, 0), 2**37),)
    rtx = PlanOptions(builder="rtx")
    folder = export(engines=[])
    refused(RuntimeMissingError, "TensorRT-RTX does not build for sm_90. Use TensorRT: Run `pip install", folder, rtx)
    refused(RuntimeMissingError, "tensorrt is not installed", folder)


def test_rtx_takes_no_plugins(machine: Machine, export: Export) -> None:
    machine.packages["tensorrt-rtx"] = RTX_VERSION
    folder = export(engines=[], plugins=True)
    refused(RuntimeMissingError, "TensorRT-RTX takes no plugins. Use TensorRT", folder, PlanOptions(builder="rtx"))


def test_a_plan_of_another_version(machine: Machine, export: Export) -> None:
    folder = export(builder_version="10.9.0.34")
    message = refused(ArtefactError, "was built with TensorRT 10.9.0.34, here is 10.16.1.11", folder)
    assert f"Run `hqc build-engine {folder} --engine trt --force`, or install tensorrt==10.9.0.34." in message


def test_a_plan_of_another_card(machine: Machine, export: Export) -> None:
    folder = export(engines=[("sm_80", "trt"), ("sm_120", "rtx")])
    message = refused(ArtefactError, "the GPU here, NVIDIA L4, is sm_89", folder, PlanOptions(build=False))
    assert "holds engines for sm_120 (Blackwell: RTX 50, RTX PRO), sm_80 (Ampere: A100, A30)" in message
    assert f"Run `hqc build-engine {folder} --engine rtx` on this machine." in message


def test_no_plan_at_all(machine: Machine, export: Export) -> None:
    refused(ArtefactError, "holds no engine; the GPU here", export(engines=[]), PlanOptions(build=False))


def test_a_plan_of_another_profile(machine: Machine, export: Export) -> None:
    folder = export()
    TensorRtSession(folder, PlanOptions(profile=BatchProfile(2, 2, 8)))
    wanted = PlanOptions(profile=BatchProfile(1, 2, 16))
    message = refused(ArtefactError, "takes batches of 1…8, 1…16 were asked for", folder, wanted)
    assert "--engine trt --min-batch 1 --max-batch 16 --force`" in message


@pytest.mark.parametrize("batch", [9, 16])
def test_a_batch_outside_of_the_profile(batch: int, machine: Machine, export: Export) -> None:
    folder = export()
    found = TensorRtSession(folder)
    with pytest.raises(EvaluationError) as caught:
        found(*inputs(batch))
    assert str(caught.value) == (
        f"batch of {batch}: lies outside of the engine's 1…8. "
        f"Run `hqc build-engine {folder} --engine trt --force --max-batch {batch}`."
    )


def test_a_batch_below_the_profile(machine: Machine, export: Export) -> None:
    found = TensorRtSession(export({**PLAN, "batches": [2, 2, 8]}))
    with pytest.raises(EvaluationError, match=r"batch of 1: lies outside of the engine's 2…8.*--min-batch 1`"):
        found(*inputs(1))


def test_a_damaged_plan(machine: Machine, export: Export) -> None:
    folder = export()
    plan = folder / "engine_trt_sm89.plan"
    whole = plan.read_bytes()
    plan.write_bytes(whole[:-1])
    refused(ArtefactError, "engine_trt_sm89.plan: is truncated or changed", folder)
    plan.write_bytes(whole[:-1] + b"!")
    refused(ArtefactError, "engine_trt_sm89.plan: is damaged: its sha256 is not that of build.json", folder)
    plan.unlink()
    refused(ArtefactError, "engine_trt_sm89.plan: cannot be read", folder)


def test_a_plan_of_another_model(machine: Machine, export: Export) -> None:
    refused(ArtefactError, "was built from another model than the folder's model.onnx", export(onnx="0" * 64))


def test_a_plan_that_tensorrt_refuses(machine: Machine, export: Export) -> None:
    folder = export({**PLAN, "error": "Serialization assertion failed:\n  version tag"})
    message = refused(ArtefactError, "cannot be loaded (Serialization assertion failed: version tag)", folder)
    assert f"Run `hqc build-engine {folder} --engine trt --force`" in message


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"inputs": {"sample": ["FLOAT", [-1, 4, 4, 4]]}}, "has an input sample [-1, 4, 4, 4] of another model"),
        ({"inputs": {"sample": ["HALF", [-1, *SAMPLE]]}}, "has an input sample [-1, 3, 4, 4] of another model"),
        ({"inputs": {"latents": ["FLOAT", [-1, *SAMPLE]]}}, "has an input latents [-1, 3, 4, 4] of another model"),
        ({"outputs": {"output": ["INT32", [-1]]}}, "takes or gives INT32 in output"),
    ],
)
def test_an_engine_of_another_network(changes: dict[str, Any], text: str, machine: Machine, export: Export) -> None:
    refused(ArtefactError, text, export({**PLAN, **changes}))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"outputs": {"other": ["FLOAT", [-1, *SAMPLE]]}}, ArtefactError, "has no output output"),
        ({"refuses": ["sample"]}, ArtefactError, r"refuses sample \[2, 3, 4, 4\]"),
        ({"fails": True}, EvaluationError, "TensorRT could not launch it"),
    ],
)
def test_what_goes_wrong_in_a_call(
    changes: dict[str, Any], error: type[HqcError], text: str, machine: Machine, export: Export
) -> None:
    found = TensorRtSession(export({**PLAN, **changes}))
    with pytest.raises(error, match=text):
        found(*inputs(2))


def test_an_export_for_another_target(machine: Machine, export: Export) -> None:
    refused(
        ArtefactError, "is an export for 'onnxruntime'. Export with --target tensorrt.", export(target="onnxruntime")
    )


def test_a_changed_model(machine: Machine, export: Export) -> None:
    folder = export()
    (folder / "model.onnx").write_bytes(b"other")
    refused(ArtefactError, "model.onnx: is damaged", folder)


def test_a_manifest_without_inputs(machine: Machine, export: Export) -> None:
    refused(ArtefactError, "has a manifest without inputs", export(inputs=[{"name": "sample"}]))


def test_a_program_is_no_export(tmp_path: Path, machine: Machine) -> None:
    (tmp_path / "manifest.json").write_text('{"format": "hqc-program", "files": {}}', encoding="utf-8")
    with pytest.raises(RuntimeMissingError, match=r"runtime tensorrt: cannot run .* a program"):
        load(tmp_path, runtime="tensorrt")


def test_the_command_line_exits_with_2_and_one_line(
    export: Export, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Asked, "check_kind", lambda self, model: None)  # the model has no pipeline, which comes first
    machine.driver = False
    done = CliRunner().invoke(main, ["sample", str(export()), "--runtime", "tensorrt", "--output", "x.png"])
    assert done.exit_code == 2, done.output
    assert "there is no NVIDIA driver here" in done.output
    assert "Traceback" not in done.output


def test_asdict_of_options_is_what_a_profile_is_read_from() -> None:
    options = BuildOptions(BatchProfile(1, 4, 6))
    assert BatchProfile(**asdict(options)["profile"]) == options.profile
