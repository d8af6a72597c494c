"""Weights of tables beside float activations: packed in the file, looked up in the graph, floats once it is loaded."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hqc.errors import ArtefactError, PassError, PlanError
from hqc.export import export_program
from hqc.export.lowering import OUTPUT
from hqc.export.ort_session import open_session, run_session
from hqc.passes import AttachLora, FreezeIntegers, InsertHadamard, InsertQdq, PackInt4, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.plan import QuantPlan
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.storage import load_program, save_program
from hqc.structure import site_problems

TABLES = InsertQdq(activation="float", weight="lookup")


def with_tables(program: Program, bits: int) -> Program:
    """As `fit_lookup` leaves it: every row of a weight has 2ⁿ values at most, here random ones."""
    made = run_pipeline(program, [SelectLayers(bits=f"w{bits}a4", rules="all"), TABLES])
    generator, state = torch.Generator().manual_seed(bits), dict(made.state)
    for plan in made.plan.coded:
        weight = state[f"{plan.site}.weight"]
        table = weight.std() * torch.randn(len(weight), 2**bits, generator=generator)
        places = torch.randint(0, 2**bits, weight.flatten(1).shape, generator=generator)
        state[f"{plan.site}.weight"] = table.gather(1, places).view(weight.shape)
    return made.evolve(state=state)


@pytest.mark.parametrize(("model", "bits"), [("two_sites", 4), ("geometry", 2), ("odd_channels", 3)])
@pytest.mark.parametrize("target", ["portable", "onnxruntime", "tensorrt"])
def test_every_target_computes_with_the_very_weights(
    captured: Callable[[str], Program], model: str, bits: int, target: str, tmp_path: Path
) -> None:
    program = with_tables(captured(model), bits)
    report = export_program(program, target, tmp_path / "x.onnx", float_program=captured(model))
    assert report.verification.network.forced_error < (1e-5 if target != "tensorrt" else 1e-2)
    initializers = {t.name: t for t in onnx.load(str(tmp_path / "x.onnx" / "model.onnx")).graph.initializer}
    for plan in program.plan.coded:
        assert plan.widths == f"w{bits}~a16"
        packed = initializers.get(f"{plan.site}.weight_packed")
        assert (packed is not None and packed.data_type == onnx.TensorProto.INT4) == (target != "tensorrt")


def test_onnxruntime_folds_them_when_it_loads(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = with_tables(captured("two_sites"), 4)
    export_program(program, "onnxruntime", tmp_path / "x.onnx")
    session = open_session(tmp_path / "x.onnx" / "model.onnx", threads=1, save_to=tmp_path / "optimised.onnx")
    kinds = {node.op_type for node in onnx.load(str(tmp_path / "optimised.onnx")).graph.node}
    assert not kinds & {"GatherElements", "Cast"}
    args = program.example_inputs(2, seed=3)
    feeds = {s.name: a.numpy() for s, a in zip(program.inputs, args, strict=True)}
    found = run_session(session, [OUTPUT], feeds)[0]
    np.testing.assert_allclose(found, program.module()(*args).numpy(), rtol=1e-4, atol=1e-5)


def test_frozen_and_packed_it_is_the_same_to_the_bit(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = with_tables(captured("geometry"), 3)
    frozen = run_pipeline(program, [FreezeIntegers(), PackInt4()])
    args = program.example_inputs(2, seed=3)
    assert torch.equal(frozen.module()(*args), program.module()(*args))
    save_program(frozen, tmp_path / "x.hqc")
    again = load_program(tmp_path / "x.hqc")
    assert torch.equal(again.module()(*args), program.module()(*args))


def test_what_is_not_the_plan_is_found(captured: Callable[[str], Program], tmp_path: Path) -> None:
    program = with_tables(captured("two_sites"), 3)
    frozen = run_pipeline(program, [FreezeIntegers()])
    site = frozen.plan.coded[0]
    for one, fields, said in (
        (frozen, {"weight_bits": 4}, "its table is [16, 8]; expected 16 for each channel"),
        (frozen, {"activation_bits": 4, "weight_lookup": False}, "lacks its quantiser"),
        (frozen, {"weight_bits": None, "weight_lookup": False}, "the plan leaves it float; the graph does not"),
        (program, {"activation_bits": 4}, "lacks one of its quantisers"),
    ):
        assert site_problems(one) == []
        changed = one.evolve(plan=one.plan.with_sites({site.site: replace(site, **fields)}))
        assert any(said in text for text in site_problems(changed)), site_problems(changed)
    data = frozen.plan.to_dict()
    data["sites"] = [{**one, "weight_lookup": False} for one in data["sites"]]
    with pytest.raises(PlanError, match=r"has widths \(3, None\)"):
        QuantPlan.from_dict(data)
    state = {**frozen.state, f"{site.site}.weight_table": torch.zeros(3, 8)}
    save_program(frozen.evolve(state=state), tmp_path / "x.hqc")
    with pytest.raises(ArtefactError):
        load_program(tmp_path / "x.hqc")


def test_refusals(captured: Callable[[str], Program]) -> None:
    program = captured("two_sites")
    with pytest.raises(PlanError, match=r"leaves activations float beside mixed weights; only those of tables"):
        InsertQdq(activation="float", weight="mixed")
    with pytest.raises(PassError, match=r"is rotated for an activation that stays float. Leave the rotation out"):
        run_pipeline(program, [SelectLayers(), InsertHadamard(16, kind="regular"), TABLES])
    unfitted = run_pipeline(program, [SelectLayers(bits="w4a4", rules="all"), TABLES])
    with pytest.raises(PassError, match=r"different values; expected at most 16. Run fit_lookup first"):
        run_pipeline(unfitted, [FreezeIntegers()])
    assert run_pipeline(unfitted, [AttachLora(rank=2)]).plan == unfitted.plan
    with pytest.raises(PlanError, match=r"recipe 'ganq' leaves activations float, and a rotation is for their codes"):
        find_recipe("ganq").rotated(InsertHadamard())
    with pytest.raises(PlanError, match="leaves tables that no fit_lookup fills"):
        find_recipe("ganq").without("fit_lookup")


def test_wide_weights_stay_float(captured: Callable[[str], Program]) -> None:
    made = run_pipeline(captured("two_sites"), [SelectLayers(bits="w8a8", rules="all"), TABLES])
    assert {plan.widths for plan in made.plan.sites} == {"float"}
    assert all("tables have at most 4 bits" in plan.reason for plan in made.plan.sites)
