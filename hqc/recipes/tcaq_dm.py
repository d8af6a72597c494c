"""TCAQ-DM: post-training quantisation by timestep and channel (AAAI 2025, arXiv 2412.16700).

    y = op(X·λ⁻¹, λ·W),  λ_c = clip(r_c/min r, 1, 10),  r_c = Σ_g ω_g·max|X_g,c|      ranges of groups of timesteps
    p̂ = s·clip(round(p/s), 0, 2ⁿ-1)  or  2^-clip(round(-log₂ p), 0, 2ⁿ-1)             each softmax, each timestep
    min ‖block(x̂; Q) - block(x)‖²  again, on inputs of the quantised program's own trajectory

A channel that is large at some timesteps has its factor moved into the weight, of convolutions as of linear layers. A
softmax whose probabilities follow a power law rather than an exponential (by the ratio of their likelihoods) is
quantised in powers of two, which keeps its small probabilities. Blocks are reconstructed as in Q-Diffusion, rounding
first, then activation scales; then in rounds whose inputs the quantised program's own sampling gives, as in use.

The softmax has 8 bits, of its own; q, k and v stay float, so that attention's products are products of floats in every
export (powers of two have no product of integers either). TensorRT and the GPU runtime leave the softmax float too.

Not published, and so the project's own choices: the weights ω of groups (by their range), four groups, the exponential
as the alternative to the power law, the likelihoods over probabilities of at least half an even step, how long each
round takes (100 steps a block for rounding, 50 for scales), two rounds besides the first, and that a round goes on from
what was learnt. Activations have one static scale a tensor, asymmetric up to 7 bits.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights, ChooseSoftmax, Smooth
from hqc.passes import (
    DropSingleKeyAttention,
    InsertAttentionQdq,
    InsertQdq,
    InsertSmoothing,
    OpenAttention,
    SelectLayers,
)
from hqc.recipes.recipe import Recipe
from hqc.training import Reconstruct

__all__ = ["TCAQ_DM"]

TCAQ_DM = Recipe(
    name="tcaq-dm",
    source="arXiv 2412.16700",
    steps=(
        DropSingleKeyAttention(),
        OpenAttention(),
        SelectLayers(rules="all"),
        InsertSmoothing(),
        Smooth(by="timestep_range"),
        InsertQdq(activation="asymmetric", static=True),
        InsertAttentionQdq(),
        CalibrateWeights(),
        CalibrateActivations(candidates=80, power=2.4),
        ChooseSoftmax(),
        Reconstruct(learn="rounding", iterations=100, rounds=3, samples_from="student"),
        CalibrateActivations(candidates=80, power=2.4),
        Reconstruct(learn="activation_scales", iterations=50, rate=1e-3, rounds=3, samples_from="student"),
    ),
    doc=__doc__,
)
