"""Patterns that other denoisers bring: each site gets its block, or a reason; none is left out of the plan."""

import pytest
import torch
from denoisers import DENOISERS, captured_denoiser, denoiser
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture import capture_module
from hqc.passes import InsertHadamard, InsertQdq, SelectLayers
from hqc.pipeline import run_pipeline
from hqc.program import InputSpec, Program

PASSES = (SelectLayers(bits="w4a4"), InsertHadamard(), InsertQdq(timesteps=(0.0, 500.0)))


class Patterns(nn.Module):
    """80 and 48 channels, 9 channels at the entrance, groups, a tied weight, attention without biases."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(9, 80, 3, padding=1)
        self.eighty = nn.Conv2d(80, 48, 3, padding=1)
        self.grouped = nn.Conv2d(48, 48, 3, padding=1, groups=3)
        self.depthwise = nn.Conv2d(48, 48, 3, padding=1, groups=48)
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(48, 48, bias=False) for _ in range(4))
        self.to_v.weight = self.to_k.weight
        self.narrow = nn.Linear(48, 4)
        self.last = nn.Linear(4, 3)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.conv_in(sample + (timestep / 1000).view(-1, 1, 1, 1))
        hidden = self.depthwise(self.grouped(self.eighty(hidden)))
        tokens = hidden.flatten(2).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(self.to_q(tokens), self.to_k(tokens), self.to_v(tokens))
        return self.last(self.narrow(self.to_out(mixed)))


@pytest.fixture(scope="module")
def patterns() -> Program:
    torch.manual_seed(70)
    program = capture_module(Patterns(), (InputSpec("sample", ("N", 9, 4, 4)), InputSpec("timestep", ("N",))))
    return run_pipeline(program, PASSES)


BLOCKS = {"eighty": 16, "to_q": 16, "to_v": 16, "to_v@2": 16, "to_out": 16, "narrow": 16}


@pytest.mark.parametrize("site", BLOCKS)
def test_channels_take_the_largest_block_that_divides_them(site: str, patterns: Program) -> None:
    plan = patterns.plan[site]
    assert (plan.block, plan.weight_bits, plan.reason) == (BLOCKS[site], 4, "")


@pytest.mark.parametrize(
    ("site", "pass_", "reason"),
    [
        ("conv_in", "insert_hadamard", "unrotated: first or last layer"),
        ("grouped", "select_layers", "grouped convolution (3 groups): the rotation would mix groups"),
        ("depthwise", "select_layers", "grouped convolution (48 groups): the rotation would mix groups"),
        ("grouped", "insert_qdq", "float: grouped convolution (3 groups): the rotation would mix groups"),
        ("last", "insert_hadamard", "4 input channels: no power of two from 8 to 32 divides them"),
    ],
)
def test_what_is_missed_has_its_reason(site: str, pass_: str, reason: str, patterns: Program) -> None:
    (record,) = (r for r in patterns.history if str(r.text).startswith(pass_))
    assert dict(record.missed)[site] == reason


def test_nine_channels_are_quantised_without_rotation(patterns: Program) -> None:
    plan = patterns.plan["conv_in"]
    assert (plan.in_channels, plan.weight_bits, plan.activation_bits, plan.block) == (9, 8, 8, 0)


def test_a_tied_weight_is_one_tensor_with_two_grids(patterns: Program) -> None:
    """Each use has its own scales; the weight is stored once, under the last of its names."""
    assert "to_k" not in patterns.plan
    assert {"to_v.weight", "to_v.weight_scale", "to_v@2.weight_scale"} <= patterns.state.keys()
    assert "to_k.weight" not in patterns.state


def test_layers_without_bias_stay_without(patterns: Program) -> None:
    layers = dict(patterns.sites())
    assert all(len(layers[site].args) < 3 or layers[site].args[2] is None for site in ("to_q", "to_v", "to_out"))


@pytest.mark.parametrize("name", DENOISERS)
def test_no_site_of_a_denoiser_is_skipped_in_silence(name: str) -> None:
    """Every layer of the graph is in the plan; what is float or unrotated says why, in the plan and in the record."""
    quantised = run_pipeline(captured_denoiser(name), PASSES)
    assert [plan.site for plan in quantised.plan.sites] == [site for site, _ in quantised.sites()]
    for plan in quantised.plan.sites:
        if not plan.quantised or not plan.block:
            assert plan.reason, plan.site
    for record in quantised.history:
        assert {*record.touched, *dict(record.missed)} == {plan.site for plan in quantised.plan.sites}
        assert all(dict(record.missed).values())


@pytest.mark.parametrize("name", DENOISERS)
def test_layers_of_the_module_are_sites(name: str) -> None:
    """Modules that hold a weight, against the graph: a layer that capture lost would show here."""
    sites = {site.partition("@")[0] for site, _ in captured_denoiser(name).sites()}
    layers = {path for path, layer in denoiser(name).named_modules() if isinstance(layer, nn.Conv2d | nn.Linear)}
    assert sites == layers
