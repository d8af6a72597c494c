"""Published methods as data: which passes, how to calibrate, how to train."""

from collections.abc import Mapping

from hqc.errors import PlanError
from hqc.recipes.hq_dm import HQ_DM, HQ_DM_REFERENCE
from hqc.recipes.recipe import CalibrationSettings, Recipe, TrainingSettings
from hqc.recipes.rtn import RTN

__all__ = ["RECIPES", "CalibrationSettings", "Recipe", "TrainingSettings", "find_recipe"]

RECIPES: Mapping[str, Recipe] = {recipe.name: recipe for recipe in (HQ_DM, HQ_DM_REFERENCE, RTN)}
"""Every recipe by its name."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises:
        PlanError: if there is none.
    """
    if name not in RECIPES:
        raise PlanError(f"recipe {name!r}", f"unknown; there are {', '.join(RECIPES)}", "Use one of them.")
    return RECIPES[name]
