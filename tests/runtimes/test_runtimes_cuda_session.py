"""What surrounds the graph of the GPU runtime, without a GPU: captures, inputs on a device, what is refused."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from integer_programs import quantised, with_quantisers

from hqc.cli import main
from hqc.commands.asking import Asked
from hqc.errors import EvaluationError, ExportError, RuntimeMissingError
from hqc.export.prepare import prepare
from hqc.kernels import tuning
from hqc.passes import FreezeIntegers, MergeLora, PackInt4
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program
from hqc.runtimes import as_unet, load
from hqc.runtimes.base import inputs_on
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.cuda import CudaSession, session
from hqc.runtimes.integer.cuda.graphs import Captured, GraphCache
from hqc.runtimes.integer.forms import integer_form
from hqc.runtimes.integer.kernel_set import reference_kernels
from hqc.storage import save_program

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


# ---- captures ------------------------------------------------------------------------------------------------------


class Captures:
    """Stands in for CUDA: a capture remembers the module and writes its output in place, as a replay does."""

    def __init__(self) -> None:
        self.shapes: list[tuple[int, ...]] = []

    def __call__(self, module, inputs) -> Captured:
        self.shapes.append(tuple(inputs[0].shape))
        output = module(*inputs)
        return Captured(inputs, output, lambda: output.copy_(module(*inputs)))


def test_one_capture_a_batch_size_serves_every_value() -> None:
    captures = Captures()
    cache = GraphCache(lambda x, t: x * t.view(-1, 1), captures, limit=2)
    x = torch.arange(6.0).view(3, 2)
    first = cache([x, torch.tensor([1.0, 2.0, 3.0])])
    second = cache([x + 1, torch.tensor([5.0, 5.0, 0.0])])
    assert first.tolist() == [[0, 1], [4, 6], [12, 15]]  # the second call has not overwritten it
    assert second.tolist() == [[5, 10], [15, 20], [0, 0]]
    assert captures.shapes == [(3, 2)]
    assert x.tolist() == [[0, 1], [2, 3], [4, 5]]  # nor has the capture kept the caller's tensor


def test_the_least_recently_used_capture_is_dropped() -> None:
    captures = Captures()
    cache = GraphCache(lambda x: 2 * x, captures, limit=2)
    for batch in (1, 2, 1, 3, 1, 2):
        assert torch.equal(cache([torch.full((batch,), float(batch))]), torch.full((batch,), 2.0 * batch))
    # 2 was dropped for 3, and 3 for 2; 1 was used each time.
    assert captures.shapes == [(1,), (2,), (3,), (2,)]
    assert cache.shapes == (((1,),), ((2,),))


# ---- inputs --------------------------------------------------------------------------------------------------------

SPECS = (InputSpec("sample", ("N", 3, 2, 2)), InputSpec("timestep", ("N",)), InputSpec("labels", ("N",), "int64"))


def test_inputs_land_on_the_device_in_their_dtypes() -> None:
    """The meta device stands for any other than the CPU."""
    device = torch.device("meta")
    given = inputs_on(device, SPECS, torch.zeros(2, 3, 2, 2, dtype=torch.float16), 7, torch.tensor([1]))
    assert [(n, t.device, t.dtype, tuple(t.shape)) for n, t in given.items()] == [
        ("sample", device, torch.float32, (2, 3, 2, 2)),
        ("timestep", device, torch.float32, (2,)),
        ("labels", device, torch.int64, (2,)),
    ]
    with pytest.raises(EvaluationError, match="labels"):
        inputs_on(device, SPECS, torch.zeros(2, 3, 2, 2), 7)


def test_the_drop_in_says_where_it_was_placed(captured) -> None:
    stub = SimpleNamespace(inputs=captured("unconditional").inputs)
    unet = as_unet(stub, {})
    assert unet.device.type == "cpu"
    assert unet.to("meta").device.type == "meta"
    assert list(unet.parameters()) == []
    assert unet.state_dict() == {}


# ---- refusals ------------------------------------------------------------------------------------------------------


@WITHOUT_GPU
def test_without_a_gpu_it_says_so_in_one_line(captured, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = quantised(captured("two_sites"), "w4a4")
    with pytest.raises(RuntimeMissingError, match=r"runtime torch-cuda: .*CUDA") as caught:
        CudaSession(program)
    assert "\n" not in str(caught.value)
    save_program(program, tmp_path / "q.hqc")
    with pytest.raises(RuntimeMissingError, match="CUDA"):
        load(tmp_path / "q.hqc", runtime="torch-cuda")
    monkeypatch.setattr(Asked, "check_kind", lambda self, model: None)  # the model has no pipeline, which comes first
    said = CliRunner().invoke(main, ["sample", str(tmp_path / "q.hqc"), "--runtime", "torch-cuda"])
    assert said.exit_code == 2
    assert "CUDA" in said.stderr
    assert "Traceback" not in said.stderr


def test_a_float_program_is_refused_before_anything_else(captured) -> None:
    with pytest.raises(RuntimeMissingError, match=r"not quantised.*hqc ptq"):
        CudaSession(captured("two_sites"))


def test_what_else_cannot_run_there(tmp_path, captured) -> None:
    with pytest.raises(RuntimeMissingError, match="cannot run"):
        load("digits", runtime="torch-cuda")


def _card(monkeypatch, capability: tuple[int, int] = (9, 0)) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "some card")


def test_an_old_card(monkeypatch) -> None:
    _card(monkeypatch, (7, 5))
    with pytest.raises(RuntimeMissingError, match=r"some card has compute capability 7\.5; the int8 kernels need 8\.0"):
        session.require_gpu()


def test_without_triton(monkeypatch) -> None:
    _card(monkeypatch)
    session.require_gpu()
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(RuntimeMissingError, match=r"triton is not installed.*hqc\[gpu\]"):
        session.require_gpu()


def test_an_unknown_dtype(monkeypatch, captured) -> None:
    _card(monkeypatch)
    with pytest.raises(RuntimeMissingError, match="fp16, bf16, fp32"):
        CudaSession(quantised(captured("two_sites"), "w4a4"), dtype="fp8")  # type: ignore[arg-type]


def test_an_unknown_form_of_weights(monkeypatch, captured) -> None:
    _card(monkeypatch)
    with pytest.raises(RuntimeMissingError) as caught:
        CudaSession(quantised(captured("two_sites"), "w4a4"), weights="int2")  # type: ignore[arg-type]
    assert str(caught.value) == "runtime torch-cuda: has no weights 'int2'. Use int8, int4."


# ---- options, with the CPU in the place of a GPU -------------------------------------------------------------------


@pytest.fixture
def on_cpu(monkeypatch) -> SimpleNamespace:
    """Sessions run plain torch; what they capture with and which tunings they ask for is written down."""
    _card(monkeypatch)
    seen = SimpleNamespace(table=object(), asked=[], captured=[])

    def load_tuning(tune, card):
        seen.asked.append((tune, card))
        return (None if tune == "off" else seen.table), f"tiles: {tune}"

    def capture(module, inputs, *, pool) -> Captured:
        seen.captured.append((tuple(inputs[0].shape), tuning._TABLE.get()))
        return Captures()(module, inputs)

    event = SimpleNamespace(wait=lambda: None, record=lambda: None)
    for name, stand_in in (("graph_pool_handle", lambda: None), ("Event", lambda: event), ("device", nullcontext)):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(session, "triton_kernels", reference_kernels)
    monkeypatch.setattr(session, "card_of", lambda device: f"the card of {device}")
    monkeypatch.setattr(session, "load_tuning", load_tuning)
    monkeypatch.setattr(session, "capture_cuda_graph", capture)
    return seen


def test_a_session_computes_what_its_module_does(on_cpu, captured) -> None:
    program = quantised(captured("two_sites"), "w4a4")
    inputs = program.example_inputs(3, seed=1)
    found = CudaSession(program, dtype="fp32", device="cpu")(*inputs)
    options = BuildOptions(torch.device("cpu"), torch.float32)
    assert torch.equal(found, integer_module(program, reference_kernels(), options)(*inputs))
    half = session.HalfSession(captured("two_sites"), dtype="fp32", device="cpu")(*inputs)
    assert torch.allclose(half, captured("two_sites").module()(*inputs), atol=1e-5)


def test_weights_are_int8_unless_asked_for(on_cpu, captured) -> None:
    program = quantised(captured("two_sites"), "w4a4")
    plain, packed = CudaSession(program, device="cpu"), CudaSession(program, weights="int4", device="cpu")
    assert plain.report.weights == {"int8": 2}
    assert packed.report.weights == {"int4": 2}
    assert packed.report.weight_bytes * 2 == plain.report.weight_bytes
    inputs = program.example_inputs(2, seed=1)
    assert torch.equal(plain(*inputs), packed(*inputs))


def test_tiles_are_those_of_the_tuning_while_capturing(on_cpu, captured, tmp_path) -> None:
    """A file is passed on as it is; "off" takes no table; the report ends with where tiles come from."""
    program = quantised(captured("two_sites"), "w4a4")
    inputs = [program.example_inputs(batch, seed=1) for batch in (1, 2, 1)]
    for tune, table in (("auto", on_cpu.table), (tmp_path / "tiles.json", on_cpu.table), ("off", None)):
        on_cpu.captured.clear()
        made = CudaSession(program, tune=tune, device="cpu")
        assert on_cpu.asked[-1] == (tune, "the card of cpu")
        assert made.report.text().splitlines()[-1] == f"tiles: {tune}"
        for given in inputs:
            made(*given)
            assert tuning._TABLE.get() is None
        # One capture a batch size, with the table; what replays needs none.
        assert on_cpu.captured == [((1, 32, 4, 4), table), ((2, 32, 4, 4), table)]


def test_asymmetric_codes(captured) -> None:
    """0…255 passes int8; a range that only leans, with code 0 as real 0, is like any other."""
    integer = integer_form(quantised(captured("two_sites"), "w4a4"))
    with pytest.raises(ExportError, match=r"runtime torch-cuda: site conv has asymmetric activation codes 0…255"):
        integer_form(with_quantisers(integer, 0, 255))
    assert integer_form(with_quantisers(integer, -3, 12)).stage == integer.stage


def test_a_site_that_is_no_product(captured) -> None:
    frozen = run_pipeline(quantised(captured("two_sites"), "w4a4"), [MergeLora(), FreezeIntegers()])
    with pytest.raises(ExportError, match="packed but not rotated"):
        integer_form(run_pipeline(frozen, [PackInt4()]))
    # One site as a product and one that the rotation left out, as one whose sums pass int32.
    with pytest.raises(ExportError, match=r"runtime torch-cuda: site head is no integer product"):
        integer_form(_mixed(captured))


def _mixed(captured) -> Program:
    from hqc.passes import RotateWeights

    frozen = run_pipeline(quantised(captured("two_sites"), "w4a4"), [MergeLora(), FreezeIntegers()])
    return RotateWeights().apply(frozen, ["conv"])


def test_integer_programs_are_taken_as_they_are(captured) -> None:
    program = prepare(quantised(captured("two_sites"), "w4a4"), "onnxruntime")
    assert [r.text for r in integer_form(program).history] == [r.text for r in program.history]
