"""Layers that read a concatenation: numbers, names, what stays whole, and what a name of the whole site reaches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hqc.errors import PassError, PlanError
from hqc.passes import SelectLayers, SplitConcat
from hqc.pipeline import run_pass, run_pipeline
from hqc.plan import Rule, decide
from hqc.program import Program, aten, is_op
from hqc.site_names import names_site, part_site, whole_site
from hqc.storage import load_program, save_program
from hqc.text import graph_text

Captured = Callable[[str], Program]
SPLIT = ("conv_shortcut:0", "conv_shortcut:1", "fuse:0", "fuse:1", "fuse:2")


@pytest.fixture(scope="module")
def split(captured: Captured) -> Program:
    return run_pass(captured("joined"), SplitConcat(), check_numerics=True)


def doubled(program: Program) -> Program:
    return program.evolve(state={name: tensor.double() for name, tensor in program.state.items()})


def test_it_equals_the_unsplit_model_in_float64(captured: Captured, split: Program) -> None:
    whole = captured("joined")
    args = [arg.double() for arg in whole.example_inputs(3)]
    with torch.no_grad():
        wanted, found = doubled(whole).module()(*args), doubled(split).module()(*args)
    assert float((found - wanted).abs().max()) <= 1e-13 * float(wanted.abs().max())


def test_parts_are_the_columns_of_the_weight(captured: Captured, split: Program) -> None:
    whole, state = captured("joined").state, split.state
    assert torch.equal(torch.cat([state["conv_shortcut:0.weight"], state["conv_shortcut:1.weight"]], 1),
                       whole["conv_shortcut.weight"])  # fmt: skip
    assert [state[f"fuse:{n}.weight"].shape[1] for n in range(3)] == [24, 16, 8]
    assert "conv_shortcut.weight" not in state
    layers = dict(split.sites())
    assert [str(layers[f"conv_shortcut:{n}"].args[2]) for n in range(2)] == ["conv_shortcut_bias", "None"]
    assert [str(layers[f"conv_shortcut:{n}"].args[0]) for n in range(2)] == ["conv2d_1", "mul"]


def test_names_stay_where_they_were(captured: Captured, split: Program) -> None:
    """The sum has the name of the layer that it stands for: what reads it is the same text."""
    before = {node.name: node for node in captured("joined").graph.nodes}
    sums = [node for node in split.graph.nodes if is_op(node, aten.add.Tensor) and node.meta.get("site") == "fuse"]
    assert before[sums[-1].name].meta["site"] == "fuse"
    assert [site for site, _ in split.sites() if ":" in site] == list(SPLIT)
    assert split.history[-1].removed == ()


def test_misses_say_why(captured: Captured) -> None:
    findings = SplitConcat().find(captured("joined"))
    assert findings.matches == ("conv_shortcut", "fuse")
    assert dict(findings.misses) == {
        "grouped": "reads a concatenation as a grouped convolution (2 groups)",
        "rows": "reads a concatenation along axis 1, which is not its input channels",
        "cat": "norm reads it as one tensor: what follows there stays whole",
    }


@pytest.mark.parametrize("model", ["two_sites", "geometry", "single_key", "wide_channels"])
def test_it_does_not_fire_without_a_concatenation_of_channels(captured: Captured, model: str) -> None:
    program = captured(model)
    assert SplitConcat().find(program).matches == ()
    assert SplitConcat().find(program).misses == (("concatenation", "no layer of the model reads one"),)
    assert graph_text(run_pass(program, SplitConcat())) == graph_text(program)


def test_every_shortcut_of_a_unet_is_split(captured: Captured) -> None:
    """Three up blocks of two resnets have a shortcut each; their norms read the concatenations whole."""
    program = captured("unconditional")
    findings = SplitConcat().find(program)
    shortcuts = [site for site, _ in program.sites() if site.startswith("up_") and site.endswith("conv_shortcut")]
    assert findings.matches == tuple(shortcuts)
    assert len(shortcuts) == 4
    assert all("norm1 reads it as one tensor" in reason for _, reason in findings.misses)
    run_pass(program, SplitConcat(), check_numerics=True)


def test_running_again_does_nothing(split: Program) -> None:
    assert SplitConcat().find(split).matches == ()
    assert ("concatenation", "no layer of the model reads one") not in SplitConcat().find(split).misses


def test_it_comes_before_the_selection(captured: Captured) -> None:
    selected = run_pass(captured("joined"), SelectLayers(bits="w4a4"))
    with pytest.raises(PassError, match=r"split_concat: the layers are selected already. Run it before select_layers"):
        run_pass(selected, SplitConcat())


def test_it_is_saved_and_loaded(split: Program, tmp_path: Path) -> None:
    save_program(run_pass(split, SelectLayers(bits="w4a4")), tmp_path / "split.hqc")
    found = load_program(tmp_path / "split.hqc")
    args = found.example_inputs(2)
    assert torch.equal(found.module()(*args), split.module()(*args))
    assert {plan.site for plan in found.plan.sites} >= set(SPLIT)


# ---- what names a site names its parts ------------------------------------------------------------------------------


def test_a_pattern_of_the_whole_site_matches_its_parts() -> None:
    assert [names_site("conv_shortcut", part_site("conv_shortcut", n)) for n in (0, 1)] == [True, True]
    assert names_site("*shortcut:1", "conv_shortcut:1")
    assert not names_site("*shortcut:1", "conv_shortcut:0")
    assert not names_site("conv_shortcut", "conv_shortcut@2:0")
    assert whole_site("conv_shortcut@2:11") == "conv_shortcut@2"


def test_the_last_rule_wins_for_parts_too() -> None:
    rules = [Rule("*", "all"), Rule("fuse", "whole"), Rule("fuse:1", "one part")]
    assert [decide(site, rules).why for site in ("fuse:0", "fuse:1", "rows")] == ["whole", "one part", "all"]


def test_keep_float_by_the_whole_name_and_by_a_part(split: Program) -> None:
    kept = run_pass(split, SelectLayers(bits="w4a4", keep_float=("conv_shortcut", "fuse:1")))
    assert [plan.site for plan in kept.plan.sites if "asked for" in plan.reason] == [
        *("conv_shortcut:0", "conv_shortcut:1"),
        "fuse:1",
    ]


def test_the_shortcut_rule_holds_for_parts(split: Program) -> None:
    plans = run_pipeline(split, [SelectLayers(bits="w4a4")]).plan
    assert {plans[site].widths for site in SPLIT[:2]} == {"w8a8"}
    assert {plans[site].widths for site in SPLIT[2:]} == {"w4a4"}
    with pytest.raises(PlanError, match=r"'fuse:7'.*matches no"):
        run_pass(split, SelectLayers(keep_float=("fuse:7",)))
