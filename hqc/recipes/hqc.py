"""hqc: HQ-DM's training with what measured better on this project's model; docs/method.md has the table.

    Y = Ĥ_i·Q_a(Ĥ_i·X; s_t) · Q_w(W + B·A; s_w) + bias         Ĥ_i: kind and order chosen at every site, or none
    L = Σ (ε̂ - ε)²                                             as HQ-DM

The rotation of a site is the one whose quantised activations change the layer's output least (`choose_rotation`).
"""

from hqc.calibration import ChooseRotation
from hqc.recipes.hq_dm import HQ_DM

__all__ = ["HQC"]

HQC = HQ_DM.named("hqc").rotated(ChooseRotation())
