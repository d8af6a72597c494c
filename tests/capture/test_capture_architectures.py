"""Named architectures: the published sizes, counted without weights; outliers that are outliers."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from hqc.capture import find_source
from hqc.capture.architectures import ARCHITECTURES, Architecture, build_architecture, empty_architecture
from hqc.capture.ldm.config import UNetParams
from hqc.capture.ldm.unet import build_unet
from hqc.cli import main
from hqc.errors import CaptureError
from hqc.plan import RULE_SETS, decide
from hqc.storage import load_program

TINY = Architecture(
    "UNet2DConditionModel",
    {
        "sample_size": 8,
        "block_out_channels": (64, 128),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 1,
        "cross_attention_dim": 32,
        "attention_head_dim": 2,
    },
    condition_length=3,
)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("hqc.capture.architectures.ARCHITECTURES", {**ARCHITECTURES, "tiny": TINY})
    return "arch:tiny"


def sites(module: nn.Module) -> list[str]:
    return [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d | nn.Linear)]


@pytest.mark.parametrize(
    ("name", "parameters", "layers"),
    [
        ("ldm4-imagenet", 400_920_579, 283),  # "400.92 M params", as the original prints
        ("ldm4-bedroom", 274_056_163, 155),
        ("ldm8-church", 294_966_916, 210),
        ("sd15", 859_520_964, 282),
        ("sdxl", 2_567_463_684, 794),
    ],
)
def test_published_sizes(name: str, parameters: int, layers: int) -> None:
    module = empty_architecture(name)
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert len(sites(module)) == layers
    assert all(parameter.is_meta for parameter in module.parameters())


def test_the_reference_rule_quantises_265_sites_of_ldm4() -> None:
    """15 shortcuts and 3 downsamplers stay float; the time embedding, first and last layer have eight bits."""
    decided = {name: decide(name, RULE_SETS["reference"]) for name in sites(empty_architecture("ldm4-imagenet"))}
    assert all(rule is not None for rule in decided.values())
    left_float = [name for name, rule in decided.items() if rule is not None and rule.float_]
    assert len(decided) - len(left_float) == 265
    assert sum(name.endswith("conv_shortcut") for name in left_float) == 15
    assert sum("downsamplers" in name for name in left_float) == 3
    eight = [name for name, rule in decided.items() if rule is not None and rule.bits is not None and not rule.float_]
    assert eight == ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2", "conv_out"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        (
            "ldm4-bedroom",
            {
                "image_size": 64,
                "in_channels": 3,
                "out_channels": 3,
                "model_channels": 224,
                "channel_mult": [1, 2, 3, 4],
                "attention_resolutions": [8, 4, 2],
                "num_head_channels": 32,
            },
        ),
        (
            "ldm8-church",
            {
                "image_size": 32,
                "in_channels": 4,
                "out_channels": 4,
                "model_channels": 192,
                "channel_mult": [1, 2, 2, 4, 4],
                "attention_resolutions": [1, 2, 4, 8],
                "num_heads": 8,
                "use_scale_shift_norm": True,
                "resblock_updown": True,
            },
        ),
    ],
)
def test_names_mean_the_published_configurations(name: str, options: dict[str, object]) -> None:
    """`arch:NAME` is the module that a checkpoint with the original configuration becomes."""
    from diffusers.models.attention_processor import Attention

    wanted = build_unet(UNetParams.model_validate({"num_res_blocks": 2, **options}))
    found = empty_architecture(name)
    shapes = [{n: tuple(p.shape) for n, p in module.named_parameters()} for module in (wanted, found)]
    assert shapes[0] == shapes[1]
    heads = [[m.heads for m in module.modules() if isinstance(m, Attention)] for module in (wanted, found)]
    assert heads[0] == heads[1]
    assert len(heads[0]) > 5
    scales = [[m.scale for m in module.modules() if isinstance(m, Attention)] for module in (wanted, found)]
    assert scales[0] == scales[1]


def test_inputs_of_each_name(tiny: str) -> None:
    source = find_source(tiny)
    assert [(spec.name, spec.shape) for spec in source.inputs] == [
        ("sample", ("N", 4, 8, 8)),
        ("timestep", ("N",)),
        ("condition", ("N", 3, 32)),
    ]
    assert ARCHITECTURES["sdxl"].condition_length == ARCHITECTURES["sd15"].condition_length == 77
    assert find_source(tiny, condition_length=5).inputs[2].shape == ("N", 5, 32)


def test_unknown_names_have_a_nearest() -> None:
    with pytest.raises(CaptureError) as caught:
        find_source("arch:ldm4-imagnet")
    assert caught.value.found == "names no architecture (nearest: arch:ldm4-imagenet)"
    assert caught.value.do.startswith("There are arch:ldm4-imagenet, arch:ldm4-bedroom, arch:ldm8-church, ")
    with pytest.raises(CaptureError, match=r"names no architecture\. There are"):
        find_source("arch:zzz")


# ---- outliers ------------------------------------------------------------------------------------------------------


def layer_inputs(module: nn.Module) -> tuple[dict[str, float], Tensor]:
    """max |x| / rms(x) of every conv and linear input that a norm feeds, and the network's output."""
    peaks: dict[str, float] = {}

    def watch(name: str) -> object:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            peaks[name] = float(args[0].abs().max() / args[0].square().mean().sqrt())

        return hook

    for name, child in module.named_modules():
        if name.rpartition(".")[2] in ("conv1", "conv2", "to_q", "proj"):  # behind a norm
            child.register_forward_pre_hook(watch(name))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    condition = torch.randn(2, 3, 32, generator=generator)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        output = module(sample, torch.tensor([10.0, 900.0]), encoder_hidden_states=condition, return_dict=False)[0]
    return peaks, output


def test_outliers_are_heavy_tails_and_stay_finite(tiny: str) -> None:
    plain, heavy = (build_architecture("tiny", outliers=outliers) for outliers in (False, True))
    (before, quiet), (after, loud) = layer_inputs(plain), layer_inputs(heavy)
    assert before.keys() == after.keys()
    assert len(before) > 15
    median_before, median_after = (sorted(peaks.values())[len(peaks) // 2] for peaks in (before, after))
    assert median_before < 8  # a normal distribution over 10⁴ values peaks at 4 σ
    assert median_after > 2 * median_before
    assert bool(torch.isfinite(loud).all())
    assert 0.01 < float(loud.std()) < 100
    assert not torch.equal(loud, quiet)


def test_outliers_change_the_norms_alone(tiny: str) -> None:
    plain, heavy = (dict(build_architecture("tiny", outliers=o).named_parameters()) for o in (False, True))
    changed = {name for name in plain if not torch.equal(plain[name], heavy[name])}
    assert changed
    assert all("norm" in name and name.endswith("weight") for name in changed)
    for name in changed:
        ratio = heavy[name] / plain[name]
        touched = ratio[ratio != 1]
        assert len(touched) == max(1, len(ratio) // 64)
        assert bool(((touched >= 8) & (touched <= 32)).all())


def test_outliers_on_the_command_line(tiny: str, tmp_path: Path) -> None:
    result = CliRunner(catch_exceptions=False).invoke(
        main, ["trace", tiny, "--outliers", "-o", str(tmp_path / "p.hqc")]
    )
    assert result.exit_code == 0, result.stderr
    program, plain = load_program(tmp_path / "p.hqc"), build_architecture("tiny")
    assert float(program.state["conv_norm_out.weight"].max()) > 5 > float(plain.conv_norm_out.weight.max())  # type: ignore[union-attr,operator,arg-type]
    assert bool(torch.isfinite(program.module()(*program.example_inputs(2))).all())


def test_weights_are_the_same_everywhere(tiny: str) -> None:
    """Every parameter is drawn from its own name, so neither order nor other parameters matter."""
    first, again = (build_architecture("tiny") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    other = build_architecture("tiny", seed=1)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)  # type: ignore[union-attr,arg-type]
    assert float(first.conv_in.weight.std()) == pytest.approx((4 * 9) ** -0.5, rel=0.05)  # type: ignore[operator,union-attr]
