"""SVDQuant: outliers into a low-rank branch, the rest to low bits (ICLR 2025, arXiv 2411.05007).

    X̂ = X/λ,  Ŵ = λ·W                                        λ = max|X|^a / max|W|^b by output error
    Y = Q_a(X̂; s_t) · Q_w(Ŵ - L₁L₂; s_w) + (X̂·L₂)·L₁ + bias  rank 32; L = SVD_r(Ŵ - q), q = Q(Ŵ - L), in turns

Only the first product is of integers; the branch reads X̂ itself, in float. Of the turns the best is kept, by output
error, and the first that is not better ends them.

Own choices: a scale per output channel and timestep, so that the residual stays one integer product (the paper: groups
of 64, activations scaled on the fly, which no integer product of whole rows computes: `svdquant-grouped`); convolutions
are quantised and have a branch too, k×k down and 1×1 up (deepcompressor leaves them float); the rank is at most a
quarter of a layer's smaller side; q, k and v have factors and a branch each (there they share one); no GPTQ on the
residual; errors are measured on 64 rows of five timesteps instead of whole modules.
"""

from dataclasses import replace

from hqc.calibration import CalibrateActivations, CalibrateWeights, Decompose, Smooth
from hqc.passes import AttachBranch, DropSingleKeyAttention, InsertQdq, InsertSmoothing, SelectLayers
from hqc.recipes.recipe import Recipe

__all__ = ["SVDQUANT", "SVDQUANT_GROUPED"]

_GROUPED = """SVDQuant as published: scales of groups of 64 channels, activations scaled on the fly (arXiv 2411.05007).

    X̂ = X/λ,  Ŵ = λ·W                                        λ = max|X|^a / max|W|^b by output error
    Y = Q_a(X̂) · Q_w(Ŵ - L₁L₂) + (X̂·L₂)·L₁ + bias            rank 32; L = SVD_r(Ŵ - q), q = Q(Ŵ - L), in turns
    s_w = max|w|/7 of 64 input channels                      of every output channel and tap
    s_a = max|x̂|/7 of 64 input channels                      of every token or pixel, at every call; no tables

A product of such codes adds up 64 channels as integers and the groups in float, which no integer product of whole rows
does: target portable and the torch runtime run it, in float products of quantised values; onnxruntime, tensorrt and
torch-cuda refuse it, and `svdquant` is the recipe for them.

Own choices: convolutions are quantised and have a branch too, k×k down and 1×1 up, and groups of one pixel
(deepcompressor leaves them float); the last group is shorter where 64 does not divide the channels (deepcompressor
refuses such layers); 8-bit edge layers have groups as well; scales in float32; the rank is at most a quarter of a
layer's smaller side; q, k and v have factors and a branch each (there they share one); no GPTQ on the residual, and no
shift behind GELU for codes without a sign; errors are measured on 64 rows of five timesteps instead of whole modules. A
group of zeros counts as one whose largest value is 2⁻¹⁰⁰.
"""

SVDQUANT = Recipe(
    name="svdquant",
    source="arXiv 2411.05007",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(),
        InsertSmoothing(),
        AttachBranch(),
        Smooth(),
        InsertQdq(),
        CalibrateWeights(),
        Decompose(),
        CalibrateActivations(),
    ),
    doc=__doc__,
)

SVDQUANT_GROUPED = replace(
    SVDQUANT.having("insert_qdq", activation="dynamic", activation_group=64, weight_group=64)
    .having("smooth", activation="dynamic", activation_group=64, weight_group=64)
    .having("calibrate_weights", candidates=1)
    .having("decompose", candidates=1)
    .without("calibrate_activations")
    .named("svdquant-grouped"),
    doc=_GROUPED,
)
