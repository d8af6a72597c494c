"""LoRAs that start at the quantisation error: numpy's SVD, what rounds away, what does not."""

import numpy as np
import pytest
import torch
from mixed_bits import mixed_channels

from hqc.calibration import InitLora
from hqc.calibration.lora_start import lora_of
from hqc.errors import PipelineTextError, PlanError
from hqc.passes import AttachLora, FreezeIntegers, InsertQdq, MergeLora, SelectLayers
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import Program
from hqc.sampling import Work
from hqc.structure import site_problems


def quantised(program: Program, weight: str, *more) -> Program:
    chain = [SelectLayers(bits="w3a4", rules="all"), InsertQdq((0.0,), activation="asymmetric", weight=weight), *more]
    made = run_pipeline(program, chain)
    return made.evolve(state={**made.state, **mixed_channels(made, torch.Generator().manual_seed(2))})


@pytest.mark.parametrize(("rows", "columns"), [(12, 40), (40, 12), (9, 9)])
@pytest.mark.parametrize("gain", [1.0, 0.5])
def test_it_is_the_best_of_its_rank_in_equal_shares(rows: int, columns: int, gain: float) -> None:
    error = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    a, b = lora_of(error, torch.zeros(4, columns), gain)
    assert a.is_contiguous()
    assert b.is_contiguous()
    u, s, vt = np.linalg.svd(error.double().numpy(), full_matrices=False)
    assert np.allclose((b @ a).numpy(), gain * (u[:, :4] * s[:4]) @ vt[:4], atol=1e-4)
    assert np.allclose(sorted(a.norm(dim=1).tolist()), sorted(np.sqrt(s[:4])), rtol=1e-4)
    assert np.allclose(sorted(b.norm(dim=0).tolist()), sorted(gain * np.sqrt(s[:4])), rtol=1e-4)


def test_directions_without_error_are_as_attach_lora_leaves_them() -> None:
    """Both factors zero would never learn."""
    start = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    error = torch.outer(torch.arange(5.0), torch.ones(8))
    a, b = lora_of(error, start, 1.0)
    assert torch.allclose(b @ a, error, atol=1e-5)
    kept = (b == 0).all(0)
    assert int(kept.sum()) == 2
    assert torch.equal(a[kept], start[kept])
    a, b = lora_of(torch.zeros(5, 8), start, 1.0)
    assert torch.equal(a, start)
    assert not b.any()


@pytest.mark.parametrize("weight", ["symmetric", "asymmetric", "mixed", "residual"])
def test_every_lora_is_of_what_its_quantiser_leaves(captured, weight: str) -> None:
    program = quantised(captured("two_sites"), weight, AttachLora(rank=32))
    result = run_procedure(program, InitLora(), Work(captured("two_sites")))
    assert site_problems(result) == []
    for plan in program.plan.quantised:
        layer = dict(program.sites())[plan.site]
        own = program.state[f"{plan.site}.weight"]
        made = _evaluated(program, layer.args[1])
        error = (own - made).flatten(1)
        delta = result.state[f"{plan.site}.lora_b"] @ result.state[f"{plan.site}.lora_a"]
        rank = plan.lora_rank
        u, s, vt = np.linalg.svd(error.double().numpy(), full_matrices=False)
        assert np.allclose(delta.numpy(), (u[:, :rank] * s[:rank]) @ vt[:rank], atol=1e-5)
        assert bool(delta.any())


def _evaluated(program: Program, node: torch.fx.Node) -> torch.Tensor:
    if node.op == "get_attr":
        return program.state[str(node.target)]
    return node.target(*(_evaluated(program, a) if isinstance(a, torch.fx.Node) else a for a in node.args))


def _codes(program: Program) -> dict[str, torch.Tensor]:
    frozen = run_pipeline(program, [MergeLora(), FreezeIntegers()])
    return {key: t for key, t in frozen.state.items() if key.endswith("weight_codes")}


def test_what_is_less_than_the_distance_to_a_boundary_rounds_away(captured) -> None:
    """W + B·A has the codes of W where |B·A| is small; with all of the error some cross, others stay."""
    program = quantised(captured("two_sites"), "asymmetric", AttachLora(rank=4))
    before, work = _codes(program), Work(captured("two_sites"))
    small = run_procedure(program, InitLora(gain=1e-6), work)
    assert any(bool(t.any()) for key, t in small.state.items() if key.endswith("lora_b"))
    assert all(torch.equal(t, before[key]) for key, t in _codes(small).items())
    whole = _codes(run_procedure(program, InitLora(gain=1.0), work))
    changed = [int((t != before[key]).sum()) for key, t in whole.items()]
    assert all(0 < n < t.numel() / 2 for n, t in zip(changed, whole.values(), strict=True))
    assert all(int((t - before[key]).abs().max()) == 1 for key, t in whole.items())


def test_refusals(captured) -> None:
    with pytest.raises(PipelineTextError, match="option gain is 0"):
        InitLora(gain=0)
    with pytest.raises(PlanError, match=r"init_lora: no site has a LoRA\. Put attach_lora before it"):
        run_procedure(quantised(captured("two_sites"), "asymmetric"), InitLora(), Work(captured("two_sites")))
