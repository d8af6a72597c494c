"""Attention of wide heads against torch in float64: several heads, pitches, odd sizes, codes, scores of any size."""

import os

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hqc.kernels import Quantiser, wide_attention
from hqc.ops import hadamard


def parts(samples: int, tokens: int, keys: int, channels: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """q alone, k and v as slices of one wider tensor; scores of some units."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(samples, tokens, channels, generator=generator) * 1.5
    both = torch.randn(samples, keys, 2 * channels + 16, generator=generator)
    wide = both.to(device, dtype)
    return [q.to(device, dtype), wide[..., :channels], wide[..., channels + 16 :]]


def exact(q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None) -> Tensor:
    split = [t.cpu().double().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v)]
    return functional.scaled_dot_product_attention(*split, scale=scale).transpose(1, 2).flatten(2)


# triton's interpreter multiplies the bits of bfloat16 as integers: on a GPU only.
DTYPES = [torch.float16] if os.environ.get("TRITON_INTERPRET") == "1" else [torch.float16, torch.bfloat16]
SIZES = [(2, 5, 5, 96, 1), (1, 70, 150, 96, 3), (2, 130, 33, 64, 2), (1, 1, 1, 32, 1)]


@pytest.mark.parametrize(("samples", "tokens", "keys", "channels", "heads"), SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_floats(
    samples: int, tokens: int, keys: int, channels: int, heads: int, dtype: torch.dtype, device: str
) -> None:
    q, k, v = parts(samples, tokens, keys, channels, dtype, device)
    found = wide_attention(q, k, v, heads=heads)
    wanted = exact(q, k, v, heads)
    assert found.dtype == dtype
    # Probabilities are rounded twice and the result once.
    bound = 3 * (2**-11 if dtype == torch.float16 else 2**-7)
    assert float((found.cpu().double() - wanted).abs().max()) <= bound * float(v.abs().max())
    assert keys == 1 or float(wanted.std()) > 0.05


@pytest.mark.parametrize("regular", [False, True])
def test_codes(regular: bool, device: str) -> None:
    q, k, v = parts(2, 70, 140, 96, torch.float16, device)
    how = Quantiser(torch.tensor([9.0, 14.0], device=device), -7, 7, 32, regular)
    found = wide_attention(q, k, v, heads=1, quantiser=how).cpu().double()
    turned = hadamard(exact(q, k, v, 1), 32, -1, regular) * how.inverse_scale.cpu().double().view(-1, 1, 1)
    levels = turned.clamp(-7, 7)
    # Half precision of the probabilities moves levels by some thousandths: codes differ near boundaries alone.
    assert float((found - levels).abs().max()) <= 0.5 + 0.03
    assert float((found - levels.round()).abs().mean()) <= 0.02
    assert len(found.unique()) > 7


def test_scores_that_half_precision_cannot_hold(device: str) -> None:
    """Scores of thousands, and rows of which one tile of keys has all the weight."""
    q, k, v = parts(1, 20, 300, 64, torch.float16, device)
    found = wide_attention(q * 40, k, v, heads=1, scale=4.0)
    assert torch.isfinite(found).all()
    assert float((found.cpu().double() - exact(q * 40, k, v, 1, 4.0)).abs().max()) <= 5e-3 * float(v.abs().max())
