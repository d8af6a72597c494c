"""Errors site by site: between programs against plain interpreters, and between programs and exports."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, fx

from hqc.errors import ComparisonError
from hqc.evaluation.export_errors import compare_export
from hqc.evaluation.inputs import noise_inputs, spread
from hqc.evaluation.layer_errors import Comparison, ErrorNumbers, LayerError, compare_programs, error_numbers
from hqc.export import export_program
from hqc.export.prepare import prepare
from hqc.passes import InsertHadamard, InsertQdq, InsertSmoothing, SelectLayers
from hqc.pipeline import Pass, run_pipeline
from hqc.program import Program
from hqc.recipes import find_recipe
from hqc.recipes.run import Request, planned
from hqc.storage import write_manifest

Captured = Callable[[str], Program]
GRID = (0.0, 400.0, 900.0)


def quantised(program: Program) -> Program:
    """With scales that clip little of these models' values and leave their products above zero."""
    made = planned(program, find_recipe("rtn").rotated(InsertHadamard()), Request("w4a4", timesteps=GRID))
    state = {n: torch.full_like(t, 0.08) if n.endswith("scale_table") else t for n, t in made.state.items()}
    return made.evolve(state=state)


def inputs_of(program: Program) -> tuple[Tensor, ...]:
    return noise_inputs(program, 2, 3, seed=4)


class _Outputs(fx.Interpreter):
    """Every layer's output."""

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.meta.get("role") == "layer":
            self.found[n.meta["site"]] = value
        return value

    def __call__(self, *args: Tensor) -> dict[str, Tensor]:
        self.found: dict[str, Tensor] = {}
        self.run(*args)
        return self.found


def test_error_numbers_are_numpys() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(4, 5, generator=generator)
    b = a + 0.1 * torch.randn(4, 5, generator=generator)
    x, y = a.double().numpy().reshape(-1), b.double().numpy().reshape(-1)
    found, relative = error_numbers(a, b), np.linalg.norm(y - x) / np.linalg.norm(x)
    assert found.relative == pytest.approx(relative)
    assert found.cosine == pytest.approx(x @ y / np.linalg.norm(x) / np.linalg.norm(y))
    assert found.max_abs == pytest.approx(np.abs(y - x).max())
    assert found.sqnr_db == pytest.approx(10 * np.log10((x**2).sum() / ((y - x) ** 2).sum()))
    assert error_numbers(a, a).relative == 0
    assert error_numbers(a, a).sqnr_db is None
    assert error_numbers(torch.zeros(2), torch.ones(2)) == ErrorNumbers(None, None, 1.0, None)


@pytest.mark.parametrize("name", ["two_sites", "shared_weights", "shared_input", "cross_attention", "geometry"])
def test_two_programs_are_compared_at_every_site(captured: Captured, name: str) -> None:
    a = captured(name)
    b, args = quantised(a), inputs_of(a)
    found = compare_programs(a, b, args)
    ours, theirs = _Outputs(a.module())(*args), _Outputs(b.module())(*args)
    assert [error.site for error in found.sites] == list(ours)
    for error in found.sites:
        assert error.arrives == error_numbers(ours[error.site], theirs[error.site])
        assert error.made is not None
        assert error.made.relative is not None
        assert error.made.relative > 0
    # Nothing has gone wrong before the first site: what arrives there was made there.
    assert found.sites[0].made == found.sites[0].arrives
    with torch.no_grad():
        assert found.output == error_numbers(a.module()(*args), b.module()(*args))
    assert (found.only_a, found.only_b, found.note) == ((), (), "")


def test_a_program_whose_weights_are_rotated_too_is_compared_before_the_rotation(captured: Captured) -> None:
    a = captured("wide_channels")
    rotated = run_pipeline(a, [SelectLayers(), InsertHadamard(64, kind="regular", weights=True)])
    for pair in ((a, rotated), (rotated, a)):
        for error in compare_programs(*pair, inputs_of(a)).sites:
            assert error.made is not None
            assert error.made.relative is not None
            assert error.made.relative < 1e-5, "float32 rounding"


def smoothed(program: Program) -> Program:
    """With factors that are not one."""
    made = run_pipeline(program, [SelectLayers(), InsertSmoothing()])
    state, generator = dict(made.state), torch.Generator().manual_seed(2)
    for plan in made.plan.sites:
        factors = 0.25 + torch.rand(plan.in_channels, generator=generator)
        state[f"{plan.site}.smoothing"] = factors.view(state[f"{plan.site}.smoothing"].shape)
        weight = state[f"{plan.site}.weight_smoothed"]
        state[f"{plan.site}.weight_smoothed"] = weight / factors.view(1, -1, *[1] * (weight.ndim - 2))
    return made.evolve(state=state)


@pytest.mark.parametrize("rotation", [(), (InsertHadamard(),), (InsertHadamard(weights=True),)])
def test_a_smoothed_program_is_compared_before_the_smoothing(captured: Captured, rotation: tuple[Pass, ...]) -> None:
    a = captured("two_sites")
    b = run_pipeline(smoothed(a), rotation)
    for pair in ((a, b), (b, a)):
        for error in compare_programs(*pair, inputs_of(a)).sites:
            assert error.made is not None
            assert error.made.relative is not None
            assert error.made.relative < 1e-5, "float32 rounding"


@pytest.mark.parametrize("target", ["portable", "onnxruntime"])
def test_an_export_of_a_smoothed_program_is_compared_on_equal_inputs(
    captured: Captured, tmp_path: Path, target: Any
) -> None:
    program = run_pipeline(smoothed(captured("two_sites")), [InsertQdq(GRID)])
    program = program.evolve(
        state={n: torch.full_like(t, 0.2) if n.endswith("scale_table") else t for n, t in program.state.items()}
    )
    export_program(program, target, tmp_path / "x")
    found = compare_export(program, tmp_path / "x", inputs_of(program))
    assert [error.site for error in found.sites] == ["conv", "head"]
    for error in found.sites:
        assert error.made is not None
        assert error.made.relative is not None
        assert error.made.relative < 1e-5


def test_what_a_site_makes_is_measured_on_equal_inputs(captured: Captured) -> None:
    """Only the first of two sites differs: the error is made there, and arrives at the second."""
    a = captured("two_sites")
    state = {**a.state, "conv.weight": 1.1 * a.state["conv.weight"]}
    found = {error.site: error for error in compare_programs(a, a.evolve(state=state), inputs_of(a)).sites}
    assert found["conv"].made is not None
    assert found["conv"].made.relative == pytest.approx(found["conv"].arrives.relative if found["conv"].arrives else 0)
    assert found["head"].made == ErrorNumbers(0.0, pytest.approx(1.0), 0.0, None)  # type: ignore[arg-type]
    assert found["head"].arrives is not None
    assert found["head"].arrives.relative is not None
    assert found["head"].arrives.relative > 0.01


def test_the_integer_form_is_compared_with_the_fake_one(captured: Captured) -> None:
    a = quantised(captured("cross_attention"))
    b = prepare(a, "onnxruntime")
    found = compare_programs(a, b, inputs_of(a))
    assert len(found.sites) == len(a.plan.quantised) > 20
    made = [e.made.relative for e in found.sites if e.made is not None and e.made.relative is not None]
    assert sorted(made)[len(made) // 2] < 1e-5  # float32 rounding, but for a code that flips
    assert max(made) < 0.05


def test_a_site_that_runs_once_for_all_tokens_is_compared_on_every_row(captured: Captured, tmp_path: Path) -> None:
    """The student has no attention over its single key: two sites are the float model's alone, one has one row."""
    a = captured("single_key")
    b, args = quantised(a), inputs_of(a)
    found = compare_programs(a, b, args)
    assert (found.only_a, found.only_b) == (("to_q", "to_k"), ())
    assert [error.site for error in found.sites] == ["to_v", "to_out", "head"]
    ours, theirs = _Outputs(a.module())(*args), _Outputs(b.module())(*args)
    assert (ours["to_out"].shape[1], theirs["to_out"].shape[1]) == (16, 1)
    errors = {error.site: error for error in found.sites}
    assert errors["to_out"].arrives == error_numbers(ours["to_out"], theirs["to_out"].expand_as(ours["to_out"]))
    assert all(e.made is not None and e.made.relative is not None and 0 < e.made.relative < 1 for e in found.sites)
    assert found.output == error_numbers(*(p.module()(*args).detach() for p in (a, b)))
    turned = compare_programs(b, a, args)
    assert (turned.only_a, turned.only_b) == ((), ("to_q", "to_k"))
    export_program(b, "onnxruntime", tmp_path / "export")
    plain = {error.site: error for error in compare_export(a, tmp_path / "export", args).sites}
    assert plain["to_q"].note == plain["to_k"].note == "not in the graph"
    for site in ("to_v", "to_out", "head"):
        arrives, wanted = plain[site].arrives, errors[site].arrives
        assert arrives is not None
        assert wanted is not None
        assert arrives.relative == pytest.approx(wanted.relative, rel=0.2)


def test_worst_comes_first() -> None:
    numbers = [ErrorNumbers(r, 1.0, 0.0, 0.0) for r in (0.1, 0.3, 0.2)]
    sites = tuple(LayerError(n, e, m) for n, e, m in zip("abc", numbers, [numbers[2], None, numbers[0]], strict=True))
    found = Comparison((*sites, LayerError("d", note="not in the graph")), numbers[0])
    assert [e.site for e in found.worst_first()] == ["b", "c", "a", "d"]
    assert [e.site for e in found.worst_first(made=True)] == ["a", "c", "b", "d"]


def test_programs_without_a_site_in_common_are_refused(captured: Captured) -> None:
    a, b = captured("two_sites"), captured("in_place")
    assert a.inputs == b.inputs
    with pytest.raises(ComparisonError, match="have no site in common"):
        compare_programs(a, b, inputs_of(a))
    with pytest.raises(ComparisonError, match="inputs"):
        compare_programs(a, captured("geometry"), inputs_of(a))


def test_timesteps_are_spread_from_the_first_to_the_last(captured: Captured) -> None:
    assert spread((1.0, 2.0, 3.0, 4.0, 5.0), 3) == (1.0, 3.0, 5.0)
    assert spread((1.0, 2.0), 9) == (1.0, 2.0)
    _, times = inputs_of(quantised(captured("two_sites")))
    assert times.tolist() == [0, 0, 400, 400, 900, 900]
    _, times = inputs_of(captured("two_sites"))
    assert times.tolist() == [0, 0, 499.5, 499.5, 999, 999]


# ---- exports -------------------------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("two_sites", "onnxruntime"),
        ("two_sites", "portable"),
        ("geometry", "onnxruntime"),
        ("geometry", "portable"),
        ("shared_input", "portable"),
        ("cross_attention", "onnxruntime"),
    ],
)
def test_an_export_is_compared_at_every_site(captured: Captured, tmp_path: Path, name: str, target: Any) -> None:
    program = quantised(captured(name))
    export_program(program, target, tmp_path / "export")
    before, args = tree(tmp_path), inputs_of(program)
    found = compare_export(program, tmp_path / "export", args)
    assert tree(tmp_path) == before
    assert [error.site for error in found.sites] == [site for site, _ in program.sites()]
    assert found.note == ""
    made = [e.made.relative for e in found.sites if e.made is not None and e.made.relative is not None]
    assert len(made) >= 0.9 * len(found.sites)
    assert sorted(made)[len(made) // 2] < 1e-5  # the export's own bound on a site, but for a code that flips
    # Against the float program the quantisation error arrives; its layout is found by shape.
    plain = compare_export(captured(name), tmp_path / "export", args)
    wanted = compare_programs(captured(name), program, args)
    for error, ours in zip(plain.sites, wanted.sites, strict=True):
        assert error.made is None
        assert error.arrives is not None, error
        assert error.arrives.relative == pytest.approx(ours.arrives.relative if ours.arrives else 0, rel=0.2)
    assert "does not lower to the graph" in plain.note


def test_a_float_export_is_compared_too(captured: Captured, tmp_path: Path) -> None:
    program = captured("geometry")
    export_program(program, "portable", tmp_path / "export")
    found = compare_export(program, tmp_path / "export", inputs_of(program))
    assert found.note == ""
    errors = [e.arrives.relative for e in found.sites if e.arrives is not None and e.arrives.relative is not None]
    assert len(errors) == len(found.sites)
    assert max(errors) < 1e-5


def test_a_site_that_was_fused_away_is_listed(captured: Captured, tmp_path: Path) -> None:
    program, folder = quantised(captured("two_sites")), tmp_path / "export"
    export_program(program, "portable", folder)
    model = onnx.load(str(folder / "model.onnx"))
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, value in enumerate(names):
                names[i] = "fused" if value == "conv" else value
    onnx.save(model, str(folder / "model.onnx"))
    found = _rewritten(program, folder)
    assert found.sites[0] == LayerError("conv", note="not in the graph")
    assert found.sites[1].arrives is not None
    assert "does not lower to the graph" in found.note
    with pytest.raises(ComparisonError, match="shows no site of the program"):
        compare_export(captured("in_place"), folder, inputs_of(program))


def _rewritten(program: Program, folder: Path) -> Comparison:
    import json

    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    (folder / "manifest.json").unlink()
    write_manifest(folder, "hqc-export", {k: v for k, v in manifest.items() if k not in ("format", "version", "files")})
    return compare_export(program, folder, inputs_of(program))
