"""Quantised attention in every target: codes of its softmax and operands checked, equal to torch, or float and said."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from attention_models import attention_quantised

import hqc
from hqc.attentions import written_out
from hqc.errors import ExportError
from hqc.export import TensorRtOptions, export_program
from hqc.export.surveys import survey
from hqc.passes import FloatAttention, InsertQdq, SelectLayers
from hqc.pipeline import run_pass, run_pipeline
from hqc.program import Program
from hqc.runtimes.integer.build import BuildOptions, integer_module
from hqc.runtimes.integer.kernel_set import reference_kernels

GRID = (0.0, 500.0, 999.0)
ONE = "1 with 0 of 2 products of integers; 1 of floats: query and key are float; 1 of floats: value is float"
POWERS = "softmax has powers of two, which no product of integers takes"
SAID = "attention runs in float: this target has no kernel for a quantised softmax or its products"


KINDS = ((0.0, 1.0, 0.0), (0.0,) * 3, (1.0,) * 3)
ATTENTIONS = [
    *((bits, "float", kinds, ONE) for bits in (4, 8) for kinds in KINDS),
    (8, "asymmetric", (0.0,) * 3, "1 with 2 of 2 products of integers"),
    (4, "symmetric", (0.0, 1.0, 0.0), f"1 with 1 of 2 products of integers; 1 of floats: {POWERS}"),
    (0, "asymmetric", (0.0,) * 3, "1 with 1 of 2 products of integers; 1 of floats: softmax is float"),
]


# Each in both targets, in one of them with a timestep a call, in turns.
@pytest.mark.parametrize(
    ("target", "one_timestep", "softmax_bits", "operands", "kinds", "said"),
    [
        (target, bool((turn + place) % 2), *one)
        for turn, one in enumerate(ATTENTIONS)
        for place, target in enumerate(("portable", "onnxruntime"))
    ],
)
def test_it_equals_torch(
    target: Any,
    one_timestep: bool,
    softmax_bits: int,
    operands: str,
    kinds: tuple[float, ...],
    said: str,
    tmp_path: Path,
) -> None:
    program = attention_quantised(softmax_bits, operands, kinds, masked=True)
    report = export_program(program, target, tmp_path / "x", one_timestep=one_timestep)
    wanted = {"to_q", "to_k", "to_v", "to_out"}
    (attention,) = written_out(program)
    wanted |= {f"{attention.name}.attention_{part}" for part in attention.quantisers}
    assert {check.site for check in report.verification.sites} == wanted
    session, args = hqc.load(tmp_path / "x").session, program.example_inputs(5, seed=3)
    if one_timestep:
        args = (args[0], torch.full((5,), 500.0), args[2])
    torch.testing.assert_close(session(*args), program.module()(*args), rtol=1e-4, atol=1e-4)
    assert report.attention == ("1 with float products of quantised values" if target == "portable" else said)
    assert f"attention {report.attention}" in str(report)
    assert survey(program, target).attention == report.attention
    if not any(kinds):
        assert not any(node.op_type in ("Log", "Pow") for node in onnx.load(str(tmp_path / "x/model.onnx")).graph.node)


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
@pytest.mark.parametrize("part", ["softmax", "query", "value"])
def test_verification_sees_a_wrong_quantiser(
    target: Any, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lowering with another scale than the program's is found at that part, and nothing is written."""
    from hqc.export import artefact

    program = attention_quantised(8, "asymmetric", (0.0,) * 3)
    own = artefact.onnx_from_program

    def wrong(prepared: Program, *given: Any, **named: Any) -> Any:
        name = next(n for n in prepared.state if n.endswith(f"attention_{part}.activation_scale_table"))
        return own(prepared.evolve(state={**prepared.state, name: prepared.state[name] * 1.3}), *given, **named)

    monkeypatch.setattr(artefact, "onnx_from_program", wrong)
    with pytest.raises(ExportError, match=rf"attention_{part}: \d+ of \d+ codes differ away from a rounding boundary"):
        export_program(program, target, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_all_codes_of_a_softmax_of_8_bits_reach_255(tmp_path: Path) -> None:
    """Unsigned bytes, which a signed one would not hold."""
    program = attention_quantised(8, "float", (0.0,) * 3)
    export_program(program, "onnxruntime", tmp_path / "x")
    model = onnx.load(str(tmp_path / "x/model.onnx"))
    kinds = {v.name: v.type.tensor_type.elem_type for v in model.graph.value_info}
    (codes,) = (name for name in kinds if name.endswith("attention_softmax.codes"))
    assert kinds[codes] == onnx.TensorProto.UINT8
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_tensor_value_info(codes, onnx.TensorProto.UINT8, None))
    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString())
    args = program.example_inputs(8)
    names = [spec.name for spec in program.inputs]
    (found,) = session.run([codes], dict(zip(names, (a.numpy() for a in args), strict=True)))
    assert int(found.max()) > 200
    assert np.unique(found).size > 40


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_tensorrt_computes_attention_in_float_and_says_so(dtype: Any, tmp_path: Path) -> None:
    program = attention_quantised(4, "asymmetric")
    report = export_program(program, "tensorrt", tmp_path / "x", tensorrt=TensorRtOptions(dtype=dtype))
    assert report.attention == f"1 float: {SAID}"
    assert f"attention 1 float: {SAID}" in str(report)
    assert {check.site for check in report.verification.sites} == {"to_q", "to_k", "to_v", "to_out"}
    assert survey(program, "tensorrt").obstacles == ()
    assert survey(program, "portable").obstacles == survey(program, "onnxruntime").obstacles == ()


def test_the_gpu_runtime_computes_attention_in_float_and_says_so() -> None:
    program = attention_quantised(4, "asymmetric")
    module = integer_module(program, reference_kernels(), BuildOptions(torch.device("cpu"), torch.float32))
    report = module.meta["report"]
    assert report.attention == f"1 float: {SAID}"
    assert f"attention: 1 float: {SAID}" in report.text()
    args = program.example_inputs(4)
    wanted = run_pass(program, FloatAttention()).module()(*args)
    torch.testing.assert_close(module(*args), wanted, rtol=1e-3, atol=1e-3)
    assert replace(report, attention="").text() != report.text()


def test_a_model_without_quantised_attention_is_silent(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = run_pipeline(captured("two_sites"), [SelectLayers(), InsertQdq(GRID)])
    report = export_program(program, "portable", tmp_path / "x")
    assert report.attention == ""
    assert "attention" not in str(report)
