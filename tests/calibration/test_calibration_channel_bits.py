"""Bits by output channel: every k by brute force, kurtosis by its definition, the mean, and what the step changes."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hqc.calibration import MixChannelBits
from hqc.calibration.channel_bits import channel_bits, kurtosis
from hqc.calibration.site_rows import collect
from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.errors import MemoryShortError, PipelineTextError, TrainingError
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.passes.rewriting import layer_inputs
from hqc.pipeline import run_pipeline, run_procedure
from hqc.program import InputSpec, Origin, Program
from hqc.sampling import Sampler, Work, synthetic_task
from hqc.structure import site_problems

QUICK = MixChannelBits(samples=2, timesteps=2, rows=24)


def heavy(channels: int, columns: int, seed: int, outliers: int = 3) -> Tensor:
    """Normal weights; some channels, not the last ones, have values far out."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(channels, columns, generator=generator)
    for channel in torch.randperm(channels, generator=generator)[:outliers]:
        weight[channel, :2] *= 20
    return weight


# ---- the choice ------------------------------------------------------------------------------------------------------


def quantised(row: np.ndarray, bits: int) -> np.ndarray:
    """A channel with 2ᵇ codes that span its values and 0; NumPy rounds half to even."""
    top = 2**bits - 1
    least, largest = min(float(row.min()), 0.0), max(float(row.max()), 0.0)
    scale = np.float32(np.float32(largest - least) / np.float32(top))
    zero = np.clip(np.rint(np.float32(-least) / scale), 0, top)
    codes = np.clip(np.rint(row * (np.float32(1) / scale)), -zero, top - zero)
    return codes * scale


def by_brute_force(weight: np.ndarray, rows: np.ndarray, bits: int, sizes: list[int]) -> np.ndarray:
    """The best of every k, each with all its channels quantised and run."""
    tails = []
    for row in weight.astype(np.float64):
        centred = row - row.mean()
        tails.append(np.mean(centred**4) / np.mean(centred**2) ** 2)
    order = np.argsort(tails, kind="stable")
    found = []
    for k in sizes:
        widths = np.full(len(weight), bits)
        for place, channel in enumerate(order):
            widths[channel] += (place >= len(order) - k) - (place < k)
        changed = np.stack([quantised(row, width) for row, width in zip(weight, widths, strict=True)])
        found.append((float((((changed - weight) @ rows.T.astype(np.float64)) ** 2).sum()), widths))
    return min(found, key=lambda pair: pair[0])[1]


@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("seed", range(6))
def test_every_k_by_brute_force(seed: int, bits: int) -> None:
    weight = heavy(10, 24, seed, outliers=seed)
    rows = torch.randn(40, 24, generator=torch.Generator().manual_seed(100 + seed))
    found = channel_bits(weight, rows, bits, 10)
    assert found.tolist() == by_brute_force(weight.numpy(), rows.numpy(), bits, list(range(6))).tolist()
    assert float(found.mean()) == bits


def test_more_than_a_tenth_of_the_channels_may_change() -> None:
    chosen = {int((channel_bits(heavy(20, 64, s, outliers=s), torch.eye(64), 3, 10) > 3).sum()) for s in range(9)}
    assert len(chosen) > 2
    assert max(chosen) > 2


@pytest.mark.parametrize(
    ("channels", "parts", "sizes"), [(25, 10, {0, 2, 5, 7, 10, 12}), (3, 10, {0, 1}), (7, 2, {0, 3})]
)
def test_only_whole_parts_are_tried(channels: int, parts: int, sizes: set[int]) -> None:
    seen = set()
    for seed in range(8):
        weight = heavy(channels, 16, seed, outliers=min(seed, channels))
        found = channel_bits(weight, torch.eye(16), 3, parts)
        assert float(found.mean()) == 3
        seen.add(int((found > 3).sum()))
    assert seen <= sizes


def test_a_convolution_is_read_by_windows() -> None:
    weight = heavy(10, 18, 1)
    rows = torch.randn(30, 18, generator=torch.Generator().manual_seed(2))
    assert torch.equal(channel_bits(weight.view(10, 2, 3, 3), rows, 4, 10), channel_bits(weight, rows, 4, 10))


def test_kurtosis() -> None:
    weight = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.0, 0.0, 0.0, 4.0], [2.0, 2.0, 2.0, 2.0]])
    # σ² = 1, E x⁴ = 1;  μ = 1, deviations -1, -1, -1, 3: (3·1 + 81)/4 / 3²;  no variance
    assert kurtosis(weight).tolist() == pytest.approx([1.0, 21 / 9, 0.0])


# ---- the step --------------------------------------------------------------------------------------------------------


class _Tails(nn.Module):
    """A convolution and a linear layer, some of whose output channels have weights far out."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 20, 3, padding=1)
        self.head = nn.Linear(20, 16)
        self.conv.weight.data = heavy(20, 144, 5, outliers=6).view(20, 16, 3, 3) / 12
        self.head.weight.data = heavy(16, 20, 6, outliers=2) / 4

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.tanh(self.conv(sample + (timestep / 1000).view(-1, 1, 1, 1)))
        return self.head(x.flatten(2).transpose(1, 2)).transpose(1, 2).view(sample.shape)


@pytest.fixture(scope="module")
def captured() -> Program:
    torch.manual_seed(3)
    inputs = (InputSpec("sample", ("N", 16, 4, 4)), InputSpec("timestep", ("N",)))
    return trace(Source(_Tails(), inputs, Origin(source="tails")))


def _mixed(captured: Program, bits: str = "w3a4", *rotation: InsertHadamard) -> Program:
    ranges = InsertQdq((100.0, 900.0), activation="asymmetric", weight="mixed")
    return run_pipeline(captured, [SelectLayers(bits=bits), *rotation, ranges])


def _work(captured: Program) -> Work:
    return Work(captured, synthetic_task(captured), Sampler(3, 1.0, 0.0))


@pytest.mark.parametrize(
    "rotation",
    [(), (InsertHadamard(8),), (InsertHadamard(16, kind="regular", weights=True),)],
    ids=["", "back", "double"],
)
def test_every_mixed_weight_is_chosen_for_by_what_its_layer_reads(
    captured: Program, rotation: tuple[InsertHadamard, ...]
) -> None:
    program = _mixed(captured, "w3a4", *rotation)
    result = run_procedure(program, QUICK, _work(captured))
    assert site_problems(result) == []
    layers = dict(program.sites())
    inputs = {site: layer_inputs(layer)[0] for site, layer in layers.items()}
    seen = collect(program, inputs, _work(captured), "x", samples=2, timesteps=2, rows=24, seed=2024)
    for site, layer in layers.items():
        weight = program.state[str(layer_inputs(layer)[1].args[0].target)]
        sizes = [len(weight) * part // 10 for part in range(6)]
        rows = torch.cat(seen[site].rows).numpy()
        wanted = by_brute_force(weight.flatten(1).numpy(), rows, 3, sizes)
        top, scale, zero = (result.state[f"{site}.weight_{leaf}"] for leaf in ("top", "scale", "zero"))
        assert (top + 1).log2().tolist() == wanted.tolist()
        changed = int((wanted > 3).sum())
        note = f"{changed} of {len(wanted)} channels with a bit more, {changed} with one less"
        assert result.plan[site].reason.endswith(note if changed else f"all {len(wanted)} channels with 3 bits")
        spanned = torch.ops.hqc.fake_quantize_bounded(weight, scale, -zero, top - zero)
        assert float((spanned - weight).abs().max()) <= 0.51 * float(scale.max())
    assert any(bool((result.state[f"{site}.weight_top"] != 7).any()) for site in layers)


def test_salient_channels_get_binary_codes(captured: Program) -> None:
    """As many as the least error says, of all k by brute force; their step is the mean of what is left."""
    ranges = InsertQdq((0.0,), activation="asymmetric", weight="residual")
    program = run_pipeline(captured, [SelectLayers(bits="w3a4", rules="all"), ranges])
    result = run_procedure(program, QUICK, _work(captured))
    assert site_problems(result) == []
    layers, found = dict(program.sites()), 0
    inputs = {site: layer_inputs(layer)[0] for site, layer in layers.items()}
    seen = collect(program, inputs, _work(captured), "x", samples=2, timesteps=2, rows=24, seed=2024)
    for site, layer in layers.items():
        weight = program.state[str(layer_inputs(layer)[1].args[0].target)].flatten(1)
        order = kurtosis(weight).sort(stable=True).indices.tolist()
        own = {leaf: result.state[f"{site}.weight_{leaf}"] for leaf in ("top", "salient", "scale", "zero")}
        errors = {k: _residual_error(weight, torch.cat(seen[site].rows), order, k) for k in _sizes(len(weight))}
        best = min(errors, key=lambda k: errors[k])
        assert (int(own["salient"].sum()), int((own["top"] == 3).sum())) == (best, best)
        assert set(own["top"].tolist()) <= {3.0, 7.0}
        assert sorted(own["salient"].nonzero().flatten().tolist()) == sorted(order[len(order) - best :])
        left = weight - own["scale"][:, None] * (weight / own["scale"][:, None]).round().clamp(
            -own["zero"][:, None], (own["top"] - own["zero"])[:, None]
        )
        assert torch.allclose(result.state[f"{site}.weight_residual_scale"], left.abs().mean(1), rtol=1e-4)
        note = f"{best} of {len(weight)} channels with binary codes more, {best} with one less"
        assert result.plan[site].reason.endswith(note if best else f"all {len(weight)} channels with 3 bits")
        found += best
    assert found


def _sizes(channels: int) -> list[int]:
    return sorted({channels * part // 10 for part in range(6)})


def _residual_error(weight: torch.Tensor, rows: torch.Tensor, order: list[int], k: int) -> float:
    total = 0.0
    for place, channel in enumerate(order):
        w = weight[channel]
        top = 3 if place < k else 7
        scale = float(w.max().clamp_min(0) - w.min().clamp_max(0)) / top
        zero = round(float(-w.min().clamp_max(0)) / scale)
        q = ((w / scale).round().clamp(-zero, top - zero)) * scale
        if place >= len(order) - k:
            q = q + (w - q).abs().mean() * torch.sign(w - q)
        total += float((rows @ (q - w)).double().square().sum())
    return total


def test_wide_weights_have_no_mixed_channels(captured: Program) -> None:
    for bits, mixed in (("w6a8", True), ("w7a8", False), ("w8a8", False)):
        program = _mixed(captured, bits)
        assert {plan.weight_mixed for plan in program.plan.quantised} == {mixed}
    result = run_procedure(program, QUICK, _work(captured))
    assert all(torch.equal(tensor, program.state[name]) for name, tensor in result.state.items())


def test_refusals(captured: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineTextError, match="option parts is 1"):
        MixChannelBits(parts=1)
    with pytest.raises(TrainingError, match="there is nothing to sample"):
        QUICK.check(_mixed(captured), Work(captured))
    monkeypatch.setattr("hqc.memory.available_bytes", lambda: 1000)
    with pytest.raises(MemoryShortError, match=r"mixing bits by 2 images: .*--set mix_channel_bits\.samples=2"):
        QUICK.check(_mixed(captured), _work(captured))
