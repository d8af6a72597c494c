"""RTN: round to nearest with MSE scales, no training: the baseline that every gain is measured against."""

from hqc.recipes.recipe import Recipe

__all__ = ["RTN"]

RTN = Recipe(name="rtn", source="round to nearest, per-timestep MSE scales")
