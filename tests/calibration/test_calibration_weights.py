"""Asymmetric ranges of weights by search: against a search by hand, and what keeps its range."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from hqc.calibration import CalibrateWeights
from hqc.calibration.weights import searched_range
from hqc.passes import InsertQdq, SelectLayers
from hqc.passes.insert_qdq import spanning_range
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import Program
from hqc.sampling import Work


@pytest.mark.parametrize("top", [torch.tensor(15.0), torch.tensor([3.0, 7.0, 15.0, 31.0])])
def test_the_search_finds_the_least_error_of_all_shares(top: torch.Tensor) -> None:
    weight = torch.randn(4, 30, generator=torch.Generator().manual_seed(0)) ** 3
    weight[3] = 0.0
    scale, zero = searched_range(weight, top, 16)
    whole, wanted_zero = spanning_range(weight, top)
    assert torch.equal(zero, wanted_zero)
    tops = top.expand(4).tolist()
    for row in range(3):
        values, z = weight[row].double().numpy(), float(zero[row])
        errors = {}
        for share in np.linspace(1.0, 0.2, 17)[:-1]:
            s = float(whole[row]) * share
            errors[s] = ((s * np.clip(np.rint(values / s), -z, tops[row] - z) - values) ** 2).sum()
        assert float(scale[row]) == pytest.approx(min(errors, key=lambda s: errors[s]), rel=1e-5)
    assert float(scale[3]) == 1.0
    assert torch.equal(searched_range(weight, top, 1)[0], whole)


def test_it_is_asked_for(captured: Callable[[str], Program]) -> None:
    program = captured("two_sites")
    heavy = program.state["conv.weight"].clone()
    heavy[:, 0, 0, 0] *= 20
    program = program.evolve(state={**program.state, "conv.weight": heavy})
    for kind in ("asymmetric", "mixed", "residual"):
        insert = InsertQdq(activation="asymmetric", weight=kind)  # type: ignore[arg-type]
        made = run_pipeline(program, [SelectLayers(bits="w4a4", rules="all"), insert])
        span, search = (
            run_procedure(made, CalibrateWeights(asymmetric=how), Work(program))  # type: ignore[arg-type]
            for how in ("span", "search")
        )
        changed = not torch.equal(span.state["conv.weight_scale"], search.state["conv.weight_scale"])
        assert changed == (kind != "residual"), "codes beside were chosen for the range that there is"
        assert torch.equal(span.state["conv.weight_zero"], search.state["conv.weight_zero"])


def test_in_a_large_layer_the_coarse_search_is_near_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(40, 100, generator=torch.Generator().manual_seed(2)) ** 3
    top = torch.tensor(15.0)

    def error(scale: torch.Tensor, zero: torch.Tensor) -> float:
        found = torch.ops.hqc.fake_quantize_bounded(weight, scale, -zero, top - zero)
        return float((found - weight).square().sum())

    whole = error(*searched_range(weight, top, 80))
    monkeypatch.setattr("hqc.calibration.weights._LARGE_LAYER", 1000)
    monkeypatch.setattr("hqc.calibration.weights._CACHED_VALUES", 1000)
    coarse = error(*searched_range(weight, top, 80))
    span = error(*spanning_range(weight, top))
    assert whole <= coarse < whole + 0.02 * (span - whole)
    assert searched_range(torch.zeros(0, 5), top, 80)[0].shape == (0,)
