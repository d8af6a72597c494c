"""A zoo of tiny named models: each function returns a `Source`, each shows one thing that a real denoiser may have."""

import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hqc.capture.diffusers_models import DiffusersUNet
from hqc.capture.source import Source
from hqc.passes import InsertHadamard
from hqc.program import InputSpec, Origin, Program
from hqc.text import graph_text

__all__ = ["PLAIN", "ROTATIONS", "SHAPES", "UNETS", "WIDE", "ZOO", "fingerprint"]


def _source(name: str, module: nn.Module, channels: int = 32, size: int = 4) -> Source:
    inputs = (InputSpec("sample", ("N", channels, size, size)), InputSpec("timestep", ("N",)))
    return Source(module, inputs, Origin(source=name))


def _shift(x: Tensor, timestep: Tensor) -> Tensor:
    """Makes the output depend on the timestep."""
    return x + (timestep / 1000).view(-1, *[1] * (x.ndim - 1))


def cross_attention() -> Source:
    """diffusers' conditional UNet with cross-attention, channels 32 and 64."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=32,
        norm_num_groups=8,
    )
    inputs = (
        InputSpec("sample", ("N", 3, 8, 8)),
        InputSpec("timestep", ("N",)),
        InputSpec("condition", ("N", 2, 32)),
    )
    return Source(DiffusersUNet(unet), inputs, Origin(source="cross_attention"), prefix="unet.")


def _unconditional(name: str, **options: Any) -> Source:
    from diffusers import UNet2DModel

    torch.manual_seed(1)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=3,
        out_channels=3,
        block_out_channels=(32, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=16,
        **options,
    )
    return _wrapped(name, unet)


def _wrapped(name: str, unet: nn.Module) -> Source:
    inputs = (InputSpec("sample", ("N", 3, 8, 8)), InputSpec("timestep", ("N",)))
    return Source(DiffusersUNet(unet), inputs, Origin(source=name), prefix="unet.")


def unconditional() -> Source:
    """diffusers' unconditional UNet with self-attention."""
    return _unconditional(
        "unconditional",
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )


def without_attention() -> Source:
    """A UNet of convolutions only."""
    return _unconditional(
        "without_attention",
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        add_attention=False,
    )


class _TwoSites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 5)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = functional.silu(self.conv(_shift(sample, timestep)))
        return self.head(hidden.flatten(2).transpose(1, 2))  # [N, H*W, 5]


def two_sites() -> Source:
    """One convolution with block 32 and one linear layer with block 16: small enough to read."""
    torch.manual_seed(2)
    return _source("two_sites", _TwoSites())


class _OddChannels(nn.Module):
    """Input channels 48 (block 16), 40 (block 8), 12 (no block), 3 (no block)."""

    def __init__(self) -> None:
        super().__init__()
        self.sixteen = nn.Conv2d(48, 40, 1)
        self.eight = nn.Conv2d(40, 12, 3, padding=1)
        self.none = nn.Conv2d(12, 3, 1)
        self.three = nn.Linear(3, 4)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.none(self.eight(self.sixteen(_shift(sample, timestep))))
        return self.three(hidden.permute(0, 2, 3, 1))  # [N, H, W, 4]


def odd_channels() -> Source:
    """Channels that 32 does not divide."""
    torch.manual_seed(3)
    return _source("odd_channels", _OddChannels(), channels=48)


class _SharedWeights(nn.Module):
    """The same convolution and the same linear layer used twice, on different inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(32, 32, 3, padding=1)
        self.linear = nn.Linear(32, 32)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.conv(torch.tanh(self.conv(_shift(sample, timestep))))
        tokens = hidden.flatten(2).transpose(1, 2)
        return self.linear(torch.tanh(self.linear(tokens)))


def shared_weights() -> Source:
    """Two sites for each weight: the second is named `@2`."""
    torch.manual_seed(4)
    return _source("shared_weights", _SharedWeights())


class _TiedTimeEmbedding(nn.Module):
    """Two linear layers that hold one Parameter, fed by one time embedding that every block reads."""

    def __init__(self) -> None:
        super().__init__()
        self.time_embedding = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 32))
        self.first = nn.Linear(32, 32, bias=False)
        self.second = nn.Linear(32, 32, bias=False)
        self.second.weight = self.first.weight
        self.conv = nn.Conv2d(32, 32, 1)
        self.register_buffer("frequencies", torch.exp(-torch.arange(8) * 0.8))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        phase = timestep[:, None] * self.frequencies[None]
        embedding = self.time_embedding(torch.cat([phase.sin(), phase.cos()], 1))
        hidden = self.conv(sample + self.first(embedding)[:, :, None, None])
        return hidden * self.second(embedding)[:, :, None, None]


def tied_time_embedding() -> Source:
    """A tied weight and a time embedding read by several blocks."""
    torch.manual_seed(5)
    return _source("tied_time_embedding", _TiedTimeEmbedding())


class _Awkward(nn.Module):
    """Everything that cannot be quantised, next to a layer that can: each must have its reason."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Conv2d(32, 32, 3, padding=1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=4)
        self.same = nn.Conv2d(32, 32, 3, padding="same")
        self.up = nn.ConvTranspose2d(32, 32, 2, stride=2)
        self.row = nn.Conv1d(32, 32, 1)
        self.across = nn.Linear(32, 32)
        self.scaled = nn.Linear(32, 32)
        self.twice = nn.Linear(32, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.same(self.grouped(self.fine(_shift(sample, timestep))))
        hidden = self.up(hidden)  # [N, 32, 2H, 2W]
        tokens = self.row(hidden.flatten(2)).permute(2, 0, 1)  # [4HW, N, 32]: the batch is not first
        tokens = self.across(tokens).transpose(0, 1)  # [N, 4HW, 32]
        tokens = functional.linear(tokens, self.scaled.weight * 0.5, self.scaled.bias)
        both = self.twice(torch.cat([tokens, -tokens]))  # [2N, 4HW, 8]
        return both[: sample.shape[0]]


def awkward() -> Source:
    """Grouped, padding='same', transposed and 1-d convolutions, a batch that is not first, a computed weight."""
    torch.manual_seed(6)
    return _source("awkward", _Awkward())


class _Geometry(nn.Module):
    """Strides, dilations, uneven paddings and kernels; a bias-free convolution and a bias-free linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.strided = nn.Conv2d(32, 32, 3, stride=2, padding=1)
        self.dilated = nn.Conv2d(32, 32, 3, padding=2, dilation=2, bias=False)
        self.uneven = nn.Conv2d(32, 64, (1, 3), stride=(1, 2), padding=(0, 1))
        self.unpadded = nn.Conv2d(64, 16, (3, 1))
        self.bias_free = nn.Linear(16, 8, bias=False)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        hidden = self.unpadded(self.uneven(self.dilated(self.strided(_shift(sample, timestep)))))
        return self.bias_free(hidden.mean((2, 3)))  # [N, 8]


def geometry() -> Source:
    """Strided, dilated and uneven convolutions; no biases."""
    torch.manual_seed(7)
    return _source("geometry", _Geometry(), size=8)


class _SharedInput(nn.Module):
    """Three linear layers that read one tensor: they share the first rotation."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(32, 32, bias=False) for _ in range(3))

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        tokens = _shift(sample, timestep).flatten(2).transpose(1, 2)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)
        return functional.scaled_dot_product_attention(q, k, v)


def shared_input() -> Source:
    """Query, key and value of one attention."""
    torch.manual_seed(8)
    return _source("shared_input", _SharedInput())


class _SingleKey(nn.Module):
    """Cross-attention over a context of one token, with its norm, its residual, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, 32, bias=False) for width in (32, 16, 16))
        self.to_out, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        tokens = _shift(sample, timestep).flatten(2).transpose(1, 2)  # [N, H*W, 32]
        parts = (self.to_q(self.norm(tokens)), self.to_k(condition), self.to_v(condition))
        q, k, v = (part.view(sample.shape[0], -1, 2, 16).transpose(1, 2) for part in parts)
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(sample.shape[0], -1, 32)
        return self.head(tokens + self.to_out(mixed) / 1.0)


def single_key() -> Source:
    """A condition of one token: softmax over one key."""
    torch.manual_seed(10)
    inputs = (InputSpec("sample", ("N", 32, 4, 4)), InputSpec("timestep", ("N",)), InputSpec("condition", ("N", 1, 16)))
    return Source(_SingleKey(), inputs, Origin(source="single_key"))


class _InPlace(nn.Module):
    """An activation that overwrites a tensor which is read before and after."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(32, 32, 1)
        self.second = nn.Conv2d(32, 32, 1)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = _shift(sample, timestep)
        before = self.first(x)
        functional.relu(x, inplace=True)
        return before + self.second(x)


def in_place() -> Source:
    """`relu_` between two readers of one tensor."""
    torch.manual_seed(9)
    return _source("in_place", _InPlace())


class _Unconditioned(nn.Module):
    """diffusers' conditional UNet, where nothing reads the condition."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.unet(sample, timestep, encoder_hidden_states=None, return_dict=False)[0]


def _convolutions(name: str, height: int, width: int, levels: int) -> Source:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(11)
    unet = UNet2DConditionModel(
        sample_size=(height, width),
        block_out_channels=(32,) * levels,
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",) * levels,
        mid_block_type="UNetMidBlock2D",
        up_block_types=("UpBlock2D",) * levels,
    )
    inputs = (InputSpec("sample", ("N", 4, height, width)), InputSpec("timestep", ("N",)))
    return Source(_Unconditioned(unet), inputs, Origin(source=name), prefix="unet.")


def seamless() -> Source:
    """Every convolution of more than one pixel wraps around the image's edges, as for tiles."""
    source = _convolutions("seamless", 8, 6, levels=2)
    for conv in source.module.modules():
        if isinstance(conv, nn.Conv2d) and conv.kernel_size != (1, 1):
            conv.padding_mode = "circular"
    return source


def odd_sides() -> Source:
    """9 × 13, which three levels do not divide: 9 → 5 → 3 and back."""
    return _convolutions("odd_sides", 9, 13, levels=3)


def plain_attention() -> Source:
    """diffusers' attention before `scaled_dot_product_attention`: baddbmm over memory that nothing has written."""
    from diffusers.models.attention_processor import AttnProcessor

    source = cross_attention()
    unet: Any = source.module.unet
    unet.set_attn_processor(AttnProcessor())
    return source


class _WideChannels(nn.Module):
    """256 channels into a strided, padded convolution; 64 into two linear layers that read one tensor; then 32."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(256, 64, 3, stride=2, padding=1)
        self.left, self.right = nn.Linear(64, 32), nn.Linear(64, 32, bias=False)
        self.head = nn.Linear(32, 5)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        tokens = functional.silu(self.conv(_shift(sample, timestep))).flatten(2).transpose(1, 2)
        return self.head(self.left(tokens) * torch.tanh(self.right(tokens)))  # [N, H*W/4, 5]


def wide_channels() -> Source:
    """Channels that every order of a regular rotation divides."""
    torch.manual_seed(12)
    return _source("wide_channels", _WideChannels(), channels=256)


class _Joined(nn.Module):
    """Concatenations: read by a shortcut and a norm, by a layer of tokens, by layers that cannot be split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.deep = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 32, 3, padding=1)
        self.norm, self.conv = nn.GroupNorm(4, 48), nn.Conv2d(48, 24, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(48, 24, 3, stride=1, padding=1)
        self.grouped = nn.Conv2d(48, 24, 1, groups=2)
        self.fuse = nn.Linear(24 + 16 + 8, 8, bias=False)
        self.rows = nn.Linear(8, 5)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        skip = self.conv_in(_shift(sample, timestep))
        joined = torch.cat([self.deep(torch.tanh(skip)), 20 * skip], 1)
        hidden = self.conv_shortcut(joined) + self.conv(functional.silu(self.norm(joined))) + self.grouped(joined)
        tokens, given = (x.flatten(2).transpose(1, 2) for x in (hidden, skip))
        fused = self.fuse(torch.cat([tokens, given, tokens[..., :8]], -1))  # [N, H*W, 8]
        return self.rows(torch.cat([fused, fused], 1))  # [N, 2*H*W, 5]


def joined() -> Source:
    """Layers that read concatenations: a convolution of two parts, 20 times apart, and a linear layer of three."""
    torch.manual_seed(13)
    return _source("joined", _Joined(), channels=16)


WIDE: Mapping[str, Callable[[], Source]] = {"wide_channels": wide_channels, "joined": joined}
SHAPES: Mapping[str, Callable[[], Source]] = {f.__name__: f for f in (seamless, odd_sides, plain_attention)}
UNETS: Mapping[str, Callable[[], Source]] = {f.__name__: f for f in (cross_attention, unconditional, without_attention)}
PLAIN: Mapping[str, Callable[[], Source]] = {
    f.__name__: f
    for f in (
        two_sites,
        odd_channels,
        shared_weights,
        tied_time_embedding,
        awkward,
        geometry,
        shared_input,
        single_key,
        in_place,
    )
}
ZOO: Mapping[str, Callable[[], Source]] = {**PLAIN, **UNETS}


ROTATIONS: Mapping[str, InsertHadamard] = {
    **{f"regular {order}": InsertHadamard(order, kind="regular") for order in (16, 32, 64, 256)},
    "regular 64 double": InsertHadamard(64, kind="regular", weights=True),
    "sylvester 32 double": InsertHadamard(32, weights=True),
}
"""Rotations besides HQ-DM's own, for `wide_channels`, whose channels every order divides."""


def fingerprint(program: Program) -> str:
    """A hash of everything that a pass must leave alone in its input: graph text, tensors, plan, history, stage."""
    digest = hashlib.sha256(graph_text(program).encode())
    for name in sorted(program.state):
        tensor = program.state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    digest.update(repr((program.plan, program.history, program.stage)).encode())
    return digest.hexdigest()
