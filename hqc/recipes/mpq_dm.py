"""MPQ-DM: mixed bits by output channel, and relations distilled, for 2 to 4 bits (AAAI 2025, arXiv 2412.11549).

    X̂ = X/λ,  Ŵ = λ·W                 λ_c = √(max|X_c|/max|W_c|) by input channel: outliers move into the weights
    Y = Q_a(X̂; δ_t, z_t) · Q_w(Ŵ + B·A; δ_o, z_o, b_o) + bias
    b_o ∈ {n-1, n, n+1}                by kurtosis of the channel, as many up as down: n in the mean, exactly
    L = Σ (ε̂ - ε)² + 100·Σ KL(softmax S ‖ softmax Ŝ),  S = F·Fᵀ of the last block's features, mean of two steps

Everything else is EfficientDM's: a LoRA before the quantiser, one (δ, z) a timestep, rates relative to δ_w. Codes of
every channel lie in int8; `hqc explain` prints the size by bits besides.

Own choices: λ and b_o are chosen on the whole trajectory, not on its first batch; up to half of the channels get a bit
more (the released code tries none and a tenth); the student's features have a gradient, which the released code cuts;
those of the step before have none, and a trajectory's first step stands alone; λ stays a multiplication in front of
the quantiser, since SiLU lies between it and the norm; operands of 7 and 8 bits have no mixed channels; rates are
`efficientdm`'s, and the weights' zero points learn at theirs. As in the released code both factors of a convolution's
LoRA are k×k, so that its rank is that of every tap, and ranges of weights span the channel while bits are chosen and
are searched by squared error in the end.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights, MixChannelBits, Smooth
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertQdq, InsertSmoothing, SelectLayers
from hqc.recipes.recipe import Recipe
from hqc.training import Distil, Group, GuidedNoise, TemporalRelation

__all__ = ["MPQ_DM"]

MPQ_DM = Recipe(
    name="mpq-dm",
    source="arXiv 2412.11549",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(rules="reference"),
        InsertSmoothing(),
        Smooth(by="max_ratio", samples=32),
        InsertQdq(activation="asymmetric", weight="mixed"),
        MixChannelBits(samples=32),
        CalibrateWeights(asymmetric="search"),
        CalibrateActivations(samples=32, candidates=80, power=2.4),
        AttachLora(rank=32, seed=3407, taps=True),
        Distil(
            losses=(GuidedNoise(), TemporalRelation(weight=100.0, window=2)),
            groups=(
                Group("*.lora_?", rate=3e-2, relative="weight_scale", decay=0.01),
                Group("*.weight_scale", rate=1e-5, positive=True),
                Group("*.weight_zero", rate=1e-6),
                Group("*.activation_scale_table", rate=1e-3, positive=True),
                Group("*.activation_zero_table", rate=1e-3),
            ),
        ),
    ),
    doc=__doc__,
)
