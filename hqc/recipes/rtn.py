"""RTN: round to nearest with MSE scales, no training: the baseline that every gain is measured against.

x̂ = s·clip(round(x/s), -q, q),  s = argmin Σ (x̂ - x)²      one s a timestep for activations, a channel for weights
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.passes import DropSingleKeyAttention, InsertQdq, SelectLayers
from hqc.recipes.recipe import Recipe

__all__ = ["RTN"]

RTN = Recipe(
    name="rtn",
    source="round to nearest, per-timestep MSE scales",
    steps=(DropSingleKeyAttention(), SelectLayers(), InsertQdq(), CalibrateWeights(), CalibrateActivations()),
    doc=__doc__,
)
