"""EfficientDM: QAT at the cost of PTQ (ICLR 2024, arXiv 2310.03270).

    Y = Q_a(X; δ_t, z_t) · Q_w(W + B·A; δ_w, z_w) + bias       the LoRA is merged before the quantiser: no float branch
    Q(x; δ, z) = δ·clip(round(x/δ), -z, 2ⁿ-1-z)                one (δ, z) a timestep (TALSQ); z whole: code 0 is real 0
    L = Σ (ε̂ - ε)²  along the teacher's trajectory             LoRA rate ∝ mean δ_w of its layer (scale-aware)

Own choices: z is rounded while training (the released code leaves it fractional, and its exported bounds with it), δ_w
is one parameter (there two share memory), scales have no decay, operands of 8 bits are symmetric (their codes q - z do
not fit int8), training runs on the sampling schedule, where the paper trains at 100 steps and takes every fifth row;
rates and updates are those of `hq-dm`, so that both can be compared (the released code makes 16 000 updates at a 75th
of them).
"""

from hqc.calibration import CalibrateActivations
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertQdq, SelectLayers
from hqc.recipes.recipe import Recipe
from hqc.training import Distil, Group

__all__ = ["EFFICIENTDM"]

EFFICIENTDM = Recipe(
    name="efficientdm",
    source="arXiv 2310.03270",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(rules="reference"),
        InsertQdq(activation="asymmetric", weight="asymmetric"),
        CalibrateActivations(samples=32, candidates=80, power=2.4),
        AttachLora(rank=32, seed=3407),
        Distil(
            groups=(
                Group("*.lora_?", rate=3e-2, relative="weight_scale", decay=0.01),
                Group("*.weight_scale", rate=1e-5, positive=True),
                Group("*.activation_scale_table", rate=1e-3, positive=True),
                Group("*.activation_zero_table", rate=1e-3),
            )
        ),
    ),
    doc=__doc__,
)
