"""hqc: HQ-DM with what measured better on this project's model, one thing at a time (docs/method.md has the table).

    Y = Ĥ_i·Q_a(Ĥ_i·X; s_t) · Q_w(W + B·A; s_w) + bias         Ĥ_i: kind and order chosen at every site, or none
    L = Σ w_t·(ε̂ - ε)²                                         w_t: what an error at step t does to the image, measured
    the result is the average of the updates, decay 0.98       the steps of a trajectory in random order

The rotation of a site is the one whose quantised activations change the layer's output least (`choose_rotation`). The
summed error of ε lies mostly in late steps, which hardly move the image: weighing spends the training where it shows.
In the sampler's order momentum mixes neighbouring steps, and every epoch ends at the last one.
"""

from dataclasses import replace

from hqc.calibration import ChooseRotation
from hqc.recipes.hq_dm import HQ_DM

__all__ = ["HQC"]

HQC = replace(
    HQ_DM.named("hqc").rotated(ChooseRotation()).having("distil", order="shuffled", weighting="effect", ema=0.98),
    source="this project, on arXiv 2512.05746",
    doc=__doc__,
)
