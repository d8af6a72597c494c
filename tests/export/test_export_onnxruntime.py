"""The form of the `onnxruntime` target: one timestep a call, shared quantisation, scales in the rotation, im2col."""

from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import capture_module
from hqc.errors import ExportError
from hqc.export import export_program
from hqc.export.lowering import OUTPUT
from hqc.export.model import onnx_from_program
from hqc.export.ort_products import _tap_indices
from hqc.export.ort_session import open_session, run_session
from hqc.export.prepare import prepare
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, aten
from hqc.runtimes import load

GRID = (0.0, 300.0, 600.0, 900.0)


def kinds(folder: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(str(folder / "model.onnx")).graph.node)


# ---- one timestep a call -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(quantised, captured, tmp_path_factory):
    """The same program with a timestep a sample, and with one a call."""
    program, folder = quantised("cross_attention", "w4a4"), tmp_path_factory.mktemp("one")
    for name, one in (("each", False), ("one", True)):
        export_program(
            program,
            "onnxruntime",
            folder / name,
            one_timestep=one,
            float_program=captured("cross_attention"),
        )
    return program, folder / "each", folder / "one"


def test_one_timestep_takes_one_number_and_writes_fewer_passes(both) -> None:
    _, each, one = both
    shapes = [open_session(f / "model.onnx", threads=1).get_inputs()[1].shape for f in (each, one)]
    assert shapes == [["N"], [1]]
    saved = kinds(each) - kinds(one)
    assert saved["Mul"] > 20  # the scale of every site's output
    assert saved["Add"] > 20  # and its bias


def test_one_timestep_equals_a_timestep_each(both) -> None:
    """Equal timesteps: the same scales, formed in another order, so to float rounding unless a code flips."""
    program, each, one = both
    sample, _, condition = program.example_inputs(4)
    outputs = [load(folder, threads=1).session(sample, 300.0, condition) for folder in (each, one)]
    close = [torch.allclose(a, b, rtol=0, atol=1e-5 * float(a.abs().max())) for a, b in zip(*outputs, strict=True)]
    assert sum(close) >= 2  # a flipped code parts a sample: one in eight does


def test_a_batch_of_several_timesteps_is_run_for_each(both) -> None:
    """Every sample of a mixed batch is what it is on its own: nothing of its neighbours."""
    program, _, one = both
    session = load(one, threads=1).session
    sample, _, condition = program.example_inputs(5)
    times = torch.tensor([900.0, 0.0, 300.0, 0.0, 900.0])
    together = session(sample, times, condition)
    for row in (torch.tensor([1, 3]), torch.tensor([0, 4]), torch.tensor([2])):
        assert torch.equal(together[row], session(sample[row], float(times[row[0]]), condition[row]))
    assert not torch.equal(session(sample[:1], 0.0, condition[:1]), session(sample[:1], 900.0, condition[:1]))


def test_the_model_itself_refuses_a_timestep_a_sample(both) -> None:
    program, _, one = both
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, program.example_inputs(2), strict=True)}
    session = open_session(one / "model.onnx", threads=1)
    with pytest.raises(Exception, match="timestep"):
        session.run([OUTPUT], feeds)
    assert run_session(session, [OUTPUT], feeds)[0].shape == feeds["sample"].shape


def test_a_model_is_not_asked_at_every_call_what_it_takes(both) -> None:
    program, *folders = both
    sample, times, condition = program.example_inputs(3)
    for folder in folders:
        session = load(folder, threads=1).session
        wanted = session(sample, times, condition)
        session._session = SimpleNamespace(run=session._session.run)
        assert torch.equal(session(sample, times, condition), wanted)


def test_a_joined_timestep_row_is_refused(captured) -> None:
    program = captured("two_sites")
    edit = program.module().graph
    inputs = {n.name: n for n in edit.nodes if n.op == "placeholder"}
    output = next(n for n in edit.nodes if n.op == "output")
    with edit.inserting_before(output):
        row = edit.call_function(aten.view.default, (inputs["timestep"], [-1, 1, 1, 1]))
        joined = edit.call_function(aten.cat.default, ([output.args[0], row], 0))
    row.meta, joined.meta = {"shape": ("N", 1, 1, 1)}, {"shape": ("N", 1, 1, 1)}
    output.replace_input_with(output.args[0], joined)
    with pytest.raises(ExportError, match=r"joins the timestep's row .* Export without one timestep"):
        onnx_from_program(program.evolve(graph=edit), "onnxruntime", 21, one_timestep=True)


# ---- activations ---------------------------------------------------------------------------------------------------


def lowered(captured, name: str, tables):
    passes = [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq(GRID)]
    program = run_pipeline(captured(name), passes)
    state = dict(program.state)
    for index, plan in enumerate(program.plan.quantised):
        state[f"{plan.site}.activation_scale_table"] = torch.full((len(GRID),), tables(index))
    model, taps = onnx_from_program(prepare(program.evolve(state=state), "onnxruntime"), "onnxruntime", 21)
    return Counter(node.op_type for node in model.graph), taps


def test_sites_that_read_one_tensor_share_codes_where_their_scales_are_equal(captured) -> None:
    equal, taps = lowered(captured, "shared_input", lambda index: 0.1)
    apart, own = lowered(captured, "shared_input", lambda index: 0.1 * (index + 1))
    assert (equal["QuantizeLinear"], apart["QuantizeLinear"]) == (1, 3)
    assert len({tap.codes.name for tap in taps.values()}) == 1
    assert len({tap.codes.name for tap in own.values()}) == 3


class _Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.conv(sample + timestep.view(-1, 1, 1, 1) / 1000)


@pytest.mark.parametrize(("size", "folded"), [(8, False), (32, True)])
def test_scales_go_into_the_rotation_where_samples_outweigh_the_matrix(tmp_path, size: int, folded: bool) -> None:
    """32 channels are 2 048 values a sample at 8×8, where a matrix of 1 024 does not pay, and 32 768 at 32×32."""
    torch.manual_seed(0)
    specs = (InputSpec("sample", ("N", 32, size, size)), InputSpec("timestep", ("N",)))
    captured = capture_module(_Image(), specs)
    program = run_pipeline(captured, [SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq(GRID)])
    table = torch.tensor([0.3, 0.35, 0.4, 0.5])
    program = program.evolve(state={**program.state, "conv.activation_scale_table": table})
    report = export_program(program, "onnxruntime", tmp_path / "image", float_program=captured)
    nodes = onnx.load(str(tmp_path / "image" / "model.onnx")).graph.node
    producers = {name: node for node in nodes for name in node.output}
    (quantiser,) = (node for node in nodes if node.op_type == "QuantizeLinear")
    assert producers[quantiser.input[0]].op_type == ("MatMul" if folded else "Mul")
    assert report.verification.network.forced_error <= 1e-5


# ---- products ------------------------------------------------------------------------------------------------------


@given(
    st.integers(3, 9),
    st.integers(3, 9),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(1, 2),
)
def test_gathered_taps_are_unfold(height: int, width: int, kh: int, kw: int, stride: int, dh: int, dw: int) -> None:
    """Against torch's unfold, for any geometry that has an output."""
    rows, columns = ((size - d * (k - 1) - 1) // stride + 1 for size, k, d in ((height, kh, dh), (width, kw, dw)))
    if rows < 1 or columns < 1:
        return
    x = torch.arange(height * width, dtype=torch.float32).view(1, 1, height, width)
    wanted = functional.unfold(x, (kh, kw), dilation=(dh, dw), stride=stride)[0].T.reshape(-1)
    taps = _tap_indices(height, width, kh, kw, stride, stride, dh, dw, rows, columns)
    assert np.array_equal(x.reshape(-1).numpy()[taps], wanted.numpy())


def test_attention_is_one_node(exported) -> None:
    _, folder, _ = exported("cross_attention", "w4a4", "onnxruntime")
    found = kinds(folder)
    assert found["MultiHeadAttention"] > 0
    assert found["Softmax"] == 0


def test_unrotated_eight_bit_weights_are_two_halves_in_one_product(exported) -> None:
    """w = w₀ + w₁ with |w_i| ≤ 64 over the same codes twice: exact, and nothing saturates."""
    program, folder, _ = exported("odd_channels", "w8a8", "onnxruntime")
    plain = [plan.site for plan in program.plan.quantised if not plan.block]
    assert plain
    nodes = onnx.load(str(folder / "model.onnx")).graph.node
    joined = [n for n in nodes if n.op_type == "Concat" and n.input[0].endswith(".weight_matrix_0")]
    assert {n.input[0].removesuffix(".weight_matrix_0") for n in joined} == set(plain)
