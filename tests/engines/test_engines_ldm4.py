"""One ResNet block and one transformer block of LDM-4, at its widths and sizes, as TensorRT-RTX engines."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engine_programs import ARCHS, quantised
from torch import Tensor, nn

from hqc.capture import trace
from hqc.capture.source import Source
from hqc.engines import build_engines
from hqc.export import export_program
from hqc.program import InputSpec, Origin

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "darwin", reason="TensorRT-RTX has no wheel for macOS"),
]


class _ResnetBlock(nn.Module):
    """The second level's first block: 192 → 384 channels at 32 × 32, with the embedding of the timestep."""

    def __init__(self) -> None:
        from diffusers.models.embeddings import TimestepEmbedding, Timesteps
        from diffusers.models.resnet import ResnetBlock2D

        super().__init__()
        self.time_proj = Timesteps(192, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(192, 768)
        self.block = ResnetBlock2D(in_channels=192, out_channels=384, temb_channels=768)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        return self.block(sample, self.time_embedding(self.time_proj(timestep)))


class _Transformer(nn.Module):
    """The second level's transformer: 384 channels at 32 × 32, one head, a condition of one token of 512."""

    def __init__(self) -> None:
        from diffusers.models.transformers.transformer_2d import Transformer2DModel

        super().__init__()
        self.block = Transformer2DModel(1, 384, in_channels=384, cross_attention_dim=512, norm_num_groups=32)

    def forward(self, sample: Tensor, timestep: Tensor, condition: Tensor) -> Tensor:
        shifted = sample + (timestep / 1000).view(-1, 1, 1, 1)
        return self.block(shifted, encoder_hidden_states=condition, return_dict=False)[0]


def resnet_block() -> Source:
    inputs = (InputSpec("sample", ("N", 192, 32, 32)), InputSpec("timestep", ("N",)))
    return Source(_ResnetBlock(), inputs, Origin(source="resnet_block"))


def transformer_block() -> Source:
    inputs = (
        InputSpec("sample", ("N", 384, 32, 32)),
        InputSpec("timestep", ("N",)),
        InputSpec("condition", ("N", 1, 512)),
    )
    return Source(_Transformer(), inputs, Origin(source="transformer_block"))


@pytest.mark.parametrize(
    ("source", "convs", "linears"),
    [
        pytest.param(resnet_block, 3, 3, id="resnet"),  # two 3 × 3, the shortcut; the embedding's two, the block's one
        pytest.param(transformer_block, 2, 10, id="transformer"),  # in and out; q, k, v, out twice, two of the GEGLU
    ],
)
def test_every_product_is_int8_on_four_architectures(
    source: Callable[[], Source], convs: int, linears: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    program = quantised(trace(source()), "w4a4")
    folder = export_program(program, "tensorrt", tmp_path / "x", verify_batch=1).folder  # 1024 tokens each
    report = build_engines(folder, archs=ARCHS)
    forms = json.loads((folder / "report.json").read_text())["forms"]
    assert sum(n for form, n in forms.items() if "conv" in form) == convs
    assert sum(n for form, n in forms.items() if "gemm" in form) == linears
    digits = sum(n for form, n in forms.items() if "two digits" in form)
    assert [engine.record.arch for engine in report.engines] == list(ARCHS)
    for engine in report.engines:
        assert engine.coverage.exceptions == ()
        assert engine.coverage.int8 == engine.coverage.products == convs + linears + digits
