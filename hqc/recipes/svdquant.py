"""SVDQuant: outliers into a low-rank branch, the rest to low bits (ICLR 2025, arXiv 2411.05007).

    X̂ = X/λ,  Ŵ = λ·W                                        λ = max|X|^a / max|W|^b by output error
    Y = Q_a(X̂; s_t) · Q_w(Ŵ - L₁L₂; s_w) + (X̂·L₂)·L₁ + bias  rank 32; L = SVD_r(Ŵ - q), q = Q(Ŵ - L), in turns

Only the first product is of integers; the branch reads X̂ itself, in float. Of the turns the best is kept, by output
error, and the first that is not better ends them.

Own choices: a scale per output channel and timestep, so that the residual stays one integer product (the paper: groups
of 64, activations scaled on the fly, which no integer product of whole rows computes); convolutions are quantised and
have a branch too, k×k down and 1×1 up (deepcompressor leaves them float); the rank is at most a quarter of a layer's
smaller side; q, k and v have factors and a branch each (there they share one); no GPTQ on the residual; errors are
measured on 64 rows of five timesteps instead of whole modules.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights, Decompose, Smooth
from hqc.passes import AttachBranch, DropSingleKeyAttention, InsertQdq, InsertSmoothing, SelectLayers
from hqc.recipes.recipe import Recipe

__all__ = ["SVDQUANT"]

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
