"""hqc: HQ-DM with what measured better on this project's model, one thing at a time (docs/method.md has the table).

    Y = Ĥ_i·Q_a(Ĥ_i·X; s_t, z_t) · Q_w(W + B·A; s_w) + bias    Ĥ_i: kind and order chosen at every site, or none
    Q_a(x; s, z) = s·clip(round(x/s), -z, 2ⁿ-1-z)              all 2ⁿ codes, where they are needed; z whole
    L = Σ w_t·(ε̂ - ε)²                                         w_t: what an error at step t does to the image, measured
    the result is the average of the updates, decay 0.99       the steps of a trajectory in random order

The rotation of a site is the one whose quantised activations change the layer's output least (`choose_rotation`).
HQ-DM's narrow range leaves one of 2ⁿ codes unused, of three bits an eighth, and both ends are alike; a zero point at
every timestep uses them all. The summed error of ε lies mostly in late steps, which hardly move the image: weighing
spends the training where it shows. In the sampler's order momentum mixes neighbouring steps, and every epoch ends at
the last one. Scales learn at rates relative to their own size, and biases learn too. Twice HQ-DM's updates are worth
0.4 dB at four bits of activations and 0.6 at three; `compare-recipes` halves them where budgets are equal.
"""

from dataclasses import replace

from hqc.calibration import ChooseRotation
from hqc.recipes.hq_dm import HQ_DM
from hqc.training import Group

__all__ = ["HQC"]

_GROUPS = (
    Group("*.lora_?", rate=3e-2, relative="weight_scale", decay=0.01),
    Group("*.bias", rate=1e-3),
    Group("*.weight_scale", rate=2e-3, relative="own", positive=True),
    Group("*.activation_scale_table", rate=5e-3, relative="own", positive=True),
    Group("*.activation_zero_table", rate=5e-3),
)

HQC = replace(
    HQ_DM.named("hqc")
    .having("insert_qdq", activation="asymmetric")
    .rotated(ChooseRotation())
    .having("distil", epochs=60, groups=_GROUPS, order="shuffled", weighting="effect", ema=0.99),
    source="this project, on arXiv 2512.05746",
    doc=__doc__,
)
