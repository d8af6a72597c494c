"""MPQ-DMv2: binary codes beside salient channels, LoRA from the error, a queue of relations (arXiv 2507.04290).

    X̂ = X/λ,  Ŵ = λ·W                       λ_c = √(max|X_c|/max|W_c|) by input channel
    Y = Q_a(X̂; δ_t, z_t) · W̄ + bias,  V = Ŵ + B·A
    W̄_o = Q_n(V_o) + α_o·sign(V_o - Q_n(V_o))   of the k salient channels;  Q_{n-1}(V_o) of the k of lightest tails
    W̄_o = Q_n(V_o)                           of the rest: n bits in the mean, exactly
    B·A starts at SVD_r(Ŵ - Q(Ŵ))
    L = Σ (ε̂ - ε)² + 100·Σ KL(softmax S ‖ softmax Ŝ),  S = F·Fqᵀ over a queue of the teacher's pixels, ±5 steps

What is integer stays so: the binary codes are a second product of the same activation codes, with scales α.
Everything else is `mpq-dm`'s.

The abstract names the three ideas; of formulas and tables none was seen and no code is released. All of this is own
choice: which channels are salient (by kurtosis, as many as the output error says), α_o = mean |V_o - Q(V_o)| to start
with and learnt then, ranges and their asymmetry, the error as it is for B·A, queue, pixels a step and the steps that
count as near, all rates. Operands of 7 and 8 bits have neither mixed channels nor binary codes.
"""

from hqc.calibration import CalibrateActivations, InitLora, MixChannelBits, Smooth
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertQdq, InsertSmoothing, SelectLayers
from hqc.recipes.recipe import Recipe
from hqc.training import Distil, Group, GuidedNoise, QueueRelation

__all__ = ["MPQ_DMV2"]

MPQ_DMV2 = Recipe(
    name="mpq-dmv2",
    source="arXiv 2507.04290",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(rules="reference"),
        InsertSmoothing(),
        Smooth(by="max_ratio", samples=32),
        InsertQdq(activation="asymmetric", weight="residual"),
        MixChannelBits(samples=32),
        CalibrateActivations(samples=32, candidates=80, power=2.4),
        AttachLora(rank=32, seed=3407),
        InitLora(),
        Distil(
            losses=(GuidedNoise(), QueueRelation(weight=100.0, queue=8192, within=5)),
            groups=(
                Group("*.lora_?", rate=3e-2, relative="weight_scale", decay=0.01),
                Group("*.weight_scale", rate=1e-5, positive=True),
                Group("*.weight_residual_scale", rate=1e-5, positive=True),
                Group("*.weight_zero", rate=1e-6),
                Group("*.activation_scale_table", rate=1e-3, positive=True),
                Group("*.activation_zero_table", rate=1e-3),
            ),
        ),
    ),
    doc=__doc__,
)
