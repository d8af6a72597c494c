"""Noise without torch: the numbers of torch.randn, from the same seed."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hqc.lite.cephes import log, sin_cos
from hqc.lite.noise import Noise

# Where torch was built with AVX2, both run the same polynomials. Elsewhere torch takes the system's functions: an angle
# and a logarithm of float32 rounding each, at radii up to 6.
EXACT = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
CLOSE = {"rtol": 0, "atol": 0.0 if EXACT else 2e-6}

SHAPES = st.one_of(
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.integers(1, 40).map(lambda n: [n]),
)


def drawn(seed: int, shapes: list[list[int]]) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**63 - 1), shapes=st.lists(SHAPES, min_size=1, max_size=4))
def test_the_same_seed_gives_torchs_numbers(seed: int, shapes: list[list[int]]) -> None:
    noise = Noise(seed)
    for wanted in drawn(seed, shapes):
        found = noise.normal(wanted.shape)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, **CLOSE)


@pytest.mark.parametrize("seed", range(20))
def test_many_numbers_of_many_seeds(seed: int) -> None:
    (wanted,) = drawn(seed, [[3, 64, 65]])
    np.testing.assert_allclose(Noise(seed).normal((3, 64, 65)), wanted, **CLOSE)


def test_a_pair_of_which_one_was_taken_is_kept() -> None:
    noise = Noise(5)
    found = [noise.normal((3,)), noise.normal((16,)), noise.normal((1,))]
    for ours, theirs in zip(found, drawn(5, [[3], [16], [1]]), strict=True):
        np.testing.assert_allclose(ours, theirs, **CLOSE)


def test_the_functions_are_right_to_float_rounding() -> None:
    x = np.linspace(2.0**-24, 1, 100_001, dtype=np.float32)
    angles = (np.linspace(0, 1, 100_001) * 2 * math.pi).astype(np.float32)
    sin, cos = sin_cos(angles)
    exact = angles.astype(np.float64)
    np.testing.assert_allclose(log(x), np.log(x.astype(np.float64)), rtol=2.0**-22, atol=2.0**-24)
    np.testing.assert_allclose(sin, np.sin(exact), rtol=0, atol=2.0**-23)
    np.testing.assert_allclose(cos, np.cos(exact), rtol=0, atol=2.0**-23)
