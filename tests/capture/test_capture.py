"""Modules into programs: equal at every batch, stable site names, and clear refusals."""

import inspect
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from zoo import ZOO

from hqc.capture import Source, capture_module, find_source, trace
from hqc.capture.sources import SourceOptions
from hqc.cli import main
from hqc.errors import CaptureError
from hqc.program import InputSpec, Origin, Program, Stage
from hqc.text import graph_text
from hqc.verify import verify

SPECS = (InputSpec("sample", ("N", 4, 4, 4)), InputSpec("timestep", ("N",)))


@pytest.mark.parametrize("batch", [1, 3, 70])
@pytest.mark.parametrize("model", ZOO)
def test_captured_equals_module(model: str, batch: int, captured: Callable[[str], Program]) -> None:
    program, module = captured(model), ZOO[model]().module.eval()
    args = program.example_inputs(batch, seed=batch)
    with torch.no_grad():
        wanted = module(*args)
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
        found = program.module()(*args)
    assert found.shape == wanted.shape
    assert wanted.norm() > 0
    # The same operators in the same order; a batch of 70 may take another kernel of the same operator.
    assert (found - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("model", ZOO)
def test_a_captured_program_verifies(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    verify(program)
    assert program.stage == Stage.CAPTURED
    assert program.history == ()
    assert program.origin.source == model
    assert 0 <= program.origin.capture_error <= 1e-6
    assert [n.name for n in program.graph.nodes if n.op == "placeholder"] == [spec.name for spec in program.inputs]
    mutable = [n for n in program.graph.nodes if n.op == "call_function" and n.target in MUTABLE]
    assert not mutable


MUTABLE = (torch.ops.aten.relu_.default, torch.ops.aten.silu_.default, torch.ops.aten.add_.Tensor)


@pytest.mark.parametrize("model", ZOO)
def test_site_names_are_unique_and_name_modules(model: str, captured: Callable[[str], Program]) -> None:
    program = captured(model)
    sites = [site for site, _ in program.sites()]
    assert len(sites) == len(set(sites)) > 0
    modules = dict(ZOO[model]().module.named_modules())
    for site in sites:
        name = re.sub(r"@\d+$", "", site)
        assert isinstance(modules.get(name, modules.get(f"unet.{name}")), (nn.Conv2d, nn.Linear)), site


@pytest.mark.parametrize("model", ZOO)
def test_calls_keep_the_path_of_their_module(model: str, captured: Callable[[str], Program]) -> None:
    """A layer's is its own module, in a wrapper without the wrapper's name; calls of the model itself have none."""
    program, whole = captured(model), ZOO[model]()
    modules = {name.removeprefix(whole.prefix): module for name, module in whole.module.named_modules()}
    scopes = {node.meta["scope"] for node in program.graph.nodes if "scope" in node.meta}
    assert scopes <= modules.keys() - {""}
    assert all("scope" not in node.meta for node in program.graph.nodes if node.op != "call_function")
    for site, layer in program.sites():
        scope, module = layer.meta.get("scope", ""), re.sub(r"@\d+$", "", site)
        # A layer that is called with its weight, not as a module, stands in the module that calls it; tied weights have
        # the name of one of their modules.
        tied = getattr(modules[scope], "weight", None) is getattr(modules.get(module), "weight", 0)
        assert scope in (module, "") or tied or module.startswith(f"{scope}."), site


def test_blocks_are_told_apart_by_the_path_of_their_module(captured: Callable[[str], Program]) -> None:
    """Additions and activations between layers too, which no weight names."""
    program = captured("unconditional")
    resnet = "down_blocks.0.resnets.0"
    inside = [n for n in program.graph.nodes if n.meta.get("scope", "").startswith(resnet)]
    assert {f"{resnet}.conv1", f"{resnet}.conv2", f"{resnet}.norm1", resnet} <= {n.meta["scope"] for n in inside}
    assert any(n.target == torch.ops.aten.add.Tensor and n.meta["scope"] == resnet for n in inside)


@pytest.mark.parametrize("model", ["two_sites", "shared_weights", "tied_time_embedding", "unconditional"])
def test_capturing_again_gives_the_same_text(model: str, captured: Callable[[str], Program]) -> None:
    again = trace(ZOO[model]())
    assert graph_text(again) == graph_text(captured(model))
    assert again.state.keys() == captured(model).state.keys()


def test_weights_used_twice_are_numbered(captured: Callable[[str], Program]) -> None:
    assert [s for s, _ in captured("shared_weights").sites()] == ["conv", "conv@2", "linear", "linear@2"]
    assert sorted(captured("shared_weights").state) == ["conv.bias", "conv.weight", "linear.bias", "linear.weight"]


def test_tied_weights_are_one_tensor_with_two_sites(captured: Callable[[str], Program]) -> None:
    program = captured("tied_time_embedding")
    sites = [s for s, _ in program.sites()]
    tied = [s for s in sites if re.sub(r"@\d+$", "", s) in ("first", "second")]
    assert len(tied) == 2
    assert tied[1] == f"{tied[0]}@2"
    assert len({"first.weight", "second.weight"} & program.state.keys()) == 1


def test_the_wrapper_is_not_part_of_diffusers_names(captured: Callable[[str], Program]) -> None:
    program = captured("unconditional")
    assert "conv_in.weight" in program.state
    assert not [name for name in program.state if name.startswith(("unet.", "model."))]
    assert "conv_in" in dict(program.sites())


def test_weights_are_not_copied() -> None:
    module = nn.Sequential()
    module.add_module("conv", nn.Conv2d(4, 4, 1))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.net(sample) + timestep.view(-1, 1, 1, 1)

    net = Net()
    program = capture_module(net, SPECS)
    assert program.state["net.conv.weight"].data_ptr() == net.net.conv.weight.data_ptr()


# ---- refusals ------------------------------------------------------------------------------------------------------


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))
        self.norm = nn.BatchNorm2d(4)

    def body(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample) + timestep.view(-1, 1, 1, 1) / 1000


class CountsInPython(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.calls += 1
        return self.body(sample, timestep) * self.calls


class CountsInABuffer(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self.count += 1
        return self.body(sample, timestep) * self.count


class OverwritesItsInput(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        sample.mul_(2)
        return self.body(sample, timestep)


class DrawsNoise(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.body(sample, timestep) + torch.randn_like(sample)


class BranchesOnValues(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.body(sample, timestep) if sample.sum() > 0 else sample


class FixesTheBatch(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.body(sample, timestep) + torch.zeros(2, 4, 4, 4)


class BranchesOnTheBatch(Base):
    """As upsamplers of video models do, whose frames multiply the batch."""

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        frames = sample.repeat(3, 1, 1, 1)
        frames = frames.contiguous() if len(frames) >= 64 else frames
        return self.body(frames.view(3, -1, 4, 4, 4).mean(0), timestep)


class ReturnsTwo(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        return {"a": self.body(sample, timestep), "b": sample}


class ReturnsNothing(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> None:
        self.body(sample, timestep)


class Raises(Base):
    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        raise RuntimeError("no weights were loaded")


PURE = "The module depends on something besides its inputs"
REFUSED = {
    CountsInPython: ("differs from the module by", PURE),
    CountsInABuffer: ("changes count when it is called", "Make it a pure function of its inputs"),
    OverwritesItsInput: ("when it is called", "Make it a pure function of its inputs"),
    DrawsNoise: (
        "aten.randn_like.default' is not one that a Program may hold (it draws random numbers)",
        "Rename or replace",
    ),
    BranchesOnValues: ("torch.export could not capture it", "Run torch.export.draft_export"),
    FixesTheBatch: ("works for some batch sizes only", "Make every size but the first axis a plain number"),
    BranchesOnTheBatch: ("works for some batch sizes only", "Make every size but the first axis a plain number"),
    ReturnsTwo: ("returns 2 values; expected one tensor", "Wrap it in a module"),
    ReturnsNothing: ("expected one tensor", "Wrap it in a module"),
    Raises: ("torch.export could not capture it (no weights were loaded", "Run torch.export.draft_export"),
}


@pytest.mark.parametrize("kind", REFUSED, ids=lambda kind: kind.__name__)
def test_modules_that_are_no_pure_function_are_refused(kind: type[Base]) -> None:
    found, do = REFUSED[kind]
    with pytest.raises(CaptureError) as caught:
        capture_module(kind(), SPECS)
    assert caught.value.where == kind.__name__
    assert found in caught.value.found
    assert caught.value.do.startswith(do)
    assert "\n" not in str(caught.value)


class HidesItsWeight(Base):
    """A weight that random inputs may not show: what it gives is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mask", torch.tensor([0.0, float("-inf")]))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.body(sample, timestep)
        weights = torch.softmax(self.mask, 0)
        return hidden * weights[0] + torch.nan_to_num(self.gain * 2).sum() * weights[1]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(value: float) -> None:
    """An infinite mask is none of them."""
    module = HidesItsWeight()
    assert capture_module(module, SPECS).origin.capture_error <= 1e-6
    with torch.no_grad():
        module.gain[2] = value
    with pytest.raises(CaptureError, match=r"NaN or infinite: gain \(1 in the first, at \[2\]\)\. The file is damaged"):
        capture_module(module, SPECS)


def test_a_module_that_overflows_is_not_called_impure() -> None:
    class Net(Base):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.body(sample, timestep).exp().exp().exp().exp()

    with pytest.raises(CaptureError, match="gives NaN or infinity for random inputs, and its weights are finite"):
        capture_module(Net(), SPECS)


def test_a_batch_norm_that_trains_is_captured_in_eval_mode() -> None:
    class Net(Base):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.norm(self.body(sample, timestep))

    assert capture_module(Net().train(), SPECS).origin.capture_error <= 1e-6


def test_the_first_of_a_tuple_is_the_output() -> None:
    class Net(Base):
        def forward(self, sample: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
            return self.body(sample, timestep), sample

    program = capture_module(Net(), SPECS)
    assert program.module()(*program.example_inputs(2)).shape == (2, 4, 4, 4)


@pytest.mark.parametrize("name", ["input", "x y", "class", "def", "1st", "a-b", "self", 'x"'])
def test_input_names_that_cannot_be_used_are_refused(name: str) -> None:
    specs = (InputSpec(name, ("N", 4, 4, 4)), InputSpec("timestep", ("N",)))

    class Net(Base):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.body(a, b)

    with pytest.raises(CaptureError, match="cannot be written as a graph"):
        capture_module(Net(), specs)


def test_an_input_and_a_weight_may_have_one_name() -> None:
    class Net(Base):
        def __init__(self) -> None:
            super().__init__()
            self.sample = nn.Parameter(torch.ones(4, 4, 4))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.body(sample, timestep) * self.sample

    program = capture_module(Net(), SPECS)
    verify(program)
    assert "sample" in program.state


@pytest.mark.parametrize("name", ['a"b', "a\\b", "a\nb", "in", "a'b", "a;b"])
def test_module_names_that_cannot_be_used_are_refused(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Conv2d(4, 4, 1)})

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layers[name](sample) + timestep.view(-1, 1, 1, 1)

    with pytest.raises(CaptureError, match=r"cannot be written as a graph|could not capture"):
        capture_module(Net(), SPECS)


@pytest.mark.parametrize("name", ["a-b", "a b", "a/b", "0", "é"])
def test_module_names_with_odd_characters(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Conv2d(4, 4, 1)})

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.layers[name](sample) + timestep.view(-1, 1, 1, 1)

    if not name.isascii():
        with pytest.raises(CaptureError, match="cannot be written as a graph"):
            capture_module(Net(), SPECS)
        return
    program = capture_module(Net(), SPECS)
    assert [s for s, _ in program.sites()] == [f"layers.{name}"]


def test_an_alias_that_is_written_in_place_is_captured_right() -> None:
    class Net(Base):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            x = self.body(sample, timestep)
            view = x.flatten(1)
            before = functional.linear(view, torch.ones(3, 64))
            x.relu_()
            return before + functional.linear(view, torch.ones(3, 64))

    assert capture_module(Net(), SPECS).origin.capture_error <= 1e-6


# ---- sources -------------------------------------------------------------------------------------------------------


@pytest.fixture
def user_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """user_module(source) writes a module that `module:callable` can name."""

    def write(source: str) -> str:
        name = f"user_module_{abs(hash(source))}"
        (tmp_path / f"{name}.py").write_text("import torch\nfrom torch import nn\n" + source)
        return name

    monkeypatch.syspath_prepend(str(tmp_path))
    yield write
    for name in [n for n in sys.modules if n.startswith("user_module_")]:
        del sys.modules[name]


GOOD = """
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
    def forward(self, x_t, timestep):
        return self.conv(x_t) + timestep.view(-1, 1, 1, 1)
def net():
    return Net(), {"x_t": torch.zeros(2, 4, 4, 4), "timestep": torch.zeros(2)}
"""


def test_module_callable(user_module: Callable[[str], str]) -> None:
    name = user_module(GOOD)
    program = trace(f"{name}:net")
    assert program.inputs == (InputSpec("x_t", ("N", 4, 4, 4)), InputSpec("timestep", ("N",)))
    assert program.origin.source == f"{name}:net"
    assert program.origin.kind == "Net"
    assert program.origin.versions["torch"] == torch.__version__
    assert [s for s, _ in program.sites()] == ["conv"]


LABELLED = """
class Net(nn.Module):
    def __init__(self, by=1):
        super().__init__()
        self.conv, self.label, self.by = nn.Conv2d(4, 4, 3, padding=1), nn.Embedding(11, 4), by
    def forward(self, sample, timestep, label):
        shift = self.label((label * self.by).long()) + timestep[:, None]
        return self.conv(sample) + shift[:, :, None, None]
def net():
    return Net(), {"sample": torch.zeros(2, 4, 4, 4), "timestep": torch.zeros(2), "label": torch.tensor([0, 10])}
def floats():
    return Net(1000), {"sample": torch.zeros(2, 4, 4, 4), "timestep": torch.zeros(2), "label": torch.zeros(2)}
"""


def test_labels_are_drawn_up_to_the_largest_of_the_example(user_module: Callable[[str], str]) -> None:
    name = user_module(LABELLED)
    program = trace(f"{name}:net")
    assert program.inputs[2] == InputSpec("label", ("N",), "int64", (0, 11))
    with pytest.raises(CaptureError, match=r"index out of range.*Give labels as a torch\.int64 example"):
        trace(f"{name}:floats")


def test_the_current_folder_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_module_here.py").write_text("import torch\nfrom torch import nn\n" + GOOD, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert [spec.name for spec in find_source("user_module_here:net").inputs] == ["x_t", "timestep"]
    del sys.modules["user_module_here"]


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("net = 5", "is a int"),
        ("other = 5", "cannot be imported (AttributeError: "),
        ("1 / 0", "cannot be imported (ZeroDivisionError: division by zero)"),
        ("def net(: pass", "cannot be imported (SyntaxError: "),
        ("def net(): raise OSError('no weights')", "raised OSError: no weights"),
        ("def net(): return 5", "returned int; expected (module, {input name: example tensor})"),
        ("def net(): return nn.Linear(2, 2)", "returned Linear; expected (module"),
        ("def net(): return nn.Linear(2, 2), torch.zeros(2)", "returned tuple; expected (module"),
        ("def net(): return nn.Linear(2, 2), {'x': 5}", "returned tuple; expected (module"),
        ("def net(): return nn.Linear(2, 2), {'x': torch.zeros(2, 2)}", "has inputs x; expected one named timestep"),
        (
            "def net(): return nn.Linear(2, 2), {'x': torch.zeros(2, 2), 'timestep': torch.tensor([1, 2])}",
            "input timestep is torch.int64; expected torch.float32, or labels from 0",
        ),
        (
            "def net(): return nn.Linear(2, 2), {'timestep': torch.zeros(2), 'label': torch.tensor([-1, 2])}",
            "input label is torch.int64; expected torch.float32, or labels from 0",
        ),
        (
            "def net(): return nn.Linear(2, 2), {'timestep': torch.zeros(2), 'label': torch.zeros(2).half()}",
            "input label is torch.float16 with 1 axes; expected torch.float32 [N, …]",
        ),
        (
            "def net(): return nn.Linear(2, 2), {'x': torch.zeros(2, 2), 'timestep': torch.tensor(1.0)}",
            "input timestep is torch.float32 with 0 axes; expected torch.float32 [N, …]",
        ),
    ],
)
def test_callables_that_do_not_fit(source: str, found: str, user_module: Callable[[str], str]) -> None:
    name = user_module(source)
    with pytest.raises(CaptureError) as caught:
        find_source(f"{name}:net")
    assert caught.value.where == f"source '{name}:net'"
    assert found in caught.value.found


def test_a_module_that_does_not_exist() -> None:
    with pytest.raises(
        CaptureError, match=r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_module'\)"
    ):
        find_source("no_such_module:net")


@pytest.mark.parametrize(
    "source", ["", "no-such-thing", "/no/such/folder", "a:b:c", "a b:c", "os.system('x'):y", "x:y()", "digits2", "a\0b"]
)
def test_unknown_sources(source: str) -> None:
    with pytest.raises(CaptureError) as caught:
        find_source(source)
    assert caught.value.where == f"source {source!r}"
    assert "nothing that hqc can trace" in caught.value.found or "model_index.json" in caught.value.found
    assert caught.value.do == (
        "Give `digits`, a diffusers pipeline or denoiser folder, a hub id, a .ckpt or .safetensors file with --config, "
        "`arch:NAME`, or `module:callable`."
    )


def test_folders_that_hold_no_denoiser(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"is a folder without model_index\.json or config\.json"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CaptureError, match="is not JSON"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(CaptureError, match="is not JSON"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(CaptureError, match="holds a AutoencoderKL; expected UNet2DConditionModel or UNet2DModel"):
        find_source(str(tmp_path))
    (tmp_path / "config.json").write_text('{"_class_name": "UNet2DModel"}')
    with pytest.raises(CaptureError, match="diffusers could not load it"):
        find_source(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CaptureError, match="the pipeline has no unet/ folder"):
        find_source(str(tmp_path))


def test_a_unet_folder_and_a_pipeline_folder(tmp_path: Path, captured: Callable[[str], Program]) -> None:
    unet = ZOO["cross_attention"]().module.unet
    unet.save_pretrained(tmp_path / "unet")
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 6}))

    alone, whole = find_source(str(tmp_path / "unet")), find_source(str(tmp_path))
    shapes = [
        [spec.shape for spec in source.inputs]
        for source in (alone, whole, find_source(str(tmp_path), condition_length=2))
    ]
    assert [s[2] for s in shapes] == [("N", 77, 32), ("N", 6, 32), ("N", 2, 32)]
    assert (alone.pipeline, whole.pipeline) == (None, tmp_path)
    assert whole.origin.pipeline == str(tmp_path)
    assert whole.origin.unet_config["block_out_channels"] == [32, 64]
    args = captured("cross_attention").example_inputs(2)
    with torch.no_grad():
        assert torch.equal(whole.module(*args), captured("cross_attention").module()(*args))

    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{")
    with pytest.raises(CaptureError, match="gives no length"):
        find_source(str(tmp_path))


def test_a_source_is_taken_as_it_is() -> None:
    class Net(Base):
        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.body(sample, timestep)

    program = trace(Source(Net(), SPECS, Origin(source="mine", revision="7")))
    assert (program.origin.source, program.origin.revision) == ("mine", "7")


def test_the_options_of_a_source_are_named_in_one_place() -> None:
    """Of `find_source`, `trace` and the command."""
    taken = [p.name for p in inspect.signature(find_source).parameters.values() if p.kind is p.KEYWORD_ONLY]
    assert list(SourceOptions.__annotations__) == taken
    given = {parameter.name for parameter in main.commands["trace"].params}
    assert given - set(taken) == {"source", "output", "loras", "force", "as_json"}
    with pytest.raises(TypeError, match="wieghts"):
        trace("digits", wieghts="raw")  # type: ignore[call-arg]
