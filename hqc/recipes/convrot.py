"""ConvRot: regular Hadamard rotations of activations and weights (arXiv 2512.03673).

    Y = Q_a(Ĥ·X; s_t) · Q_w(W·Ĥ; s_w) + bias                   double rotation: Ĥ·Ĥ = 1, both are quantised rotated
    H_4^k = H_4 ⊗ … ⊗ H_4,  H_4 = -1 on the second diagonal    regular: every row sums to √n, none is all ones, so that
                                                               a common mean of the channels stays spread out

Codes are never rotated, so the integer form is one int8 product at every width. The order is 256 where it divides the
channels, else 64, 32 (H_4 ⊗ H_4 ⊗ H_2) or 16; without one the site stays unrotated.

`convrot-single` rotates back instead (HQ-DM's form): the weight keeps its own grid. `convrot-mixed` gives attention's
values and outputs 8 bits, as the paper's mixed version does.

Own choices: a scale a timestep by MSE search instead of one a token on the fly (max|x|/7), which no integer export can
hold ahead of time; weight scales by MSE search; single rotation is of order 16, as larger ones pass one int8 digit.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.passes import DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers
from hqc.recipes.recipe import Recipe

__all__ = ["CONVROT", "CONVROT_MIXED", "CONVROT_SINGLE"]

CONVROT = Recipe(
    name="convrot",
    source="arXiv 2512.03673",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(),
        InsertHadamard(block=256, kind="regular", weights=True),
        InsertQdq(),
        CalibrateWeights(),
        CalibrateActivations(),
    ),
    doc=__doc__,
)

CONVROT_SINGLE = CONVROT.named("convrot-single").having("insert_hadamard", weights=False, block=16)

CONVROT_MIXED = CONVROT.named("convrot-mixed").having("select_layers", rules="mixed")
