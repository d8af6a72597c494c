"""Published methods as data: a recipe is a tuple of steps. One file a method."""

from collections.abc import Mapping
from pathlib import Path

from hqc.errors import PlanError
from hqc.recipes.convrot import CONVROT, CONVROT_MIXED, CONVROT_SINGLE
from hqc.recipes.efficientdm import EFFICIENTDM
from hqc.recipes.files import read_recipe
from hqc.recipes.ganq import GANQ, GANQ_INT8
from hqc.recipes.hq_dm import HQ_DM, HQ_DM_REFERENCE
from hqc.recipes.hqc import HQC
from hqc.recipes.mpq_dm import MPQ_DM
from hqc.recipes.mpq_dmv2 import MPQ_DMV2
from hqc.recipes.passionsr import PASSIONSR
from hqc.recipes.q_diffusion import Q_DIFFUSION
from hqc.recipes.quest import QUEST
from hqc.recipes.recipe import Recipe
from hqc.recipes.rtn import RTN
from hqc.recipes.segquant import SEGQUANT
from hqc.recipes.svdquant import SVDQUANT, SVDQUANT_GROUPED
from hqc.recipes.tcaq_dm import TCAQ_DM

__all__ = ["RECIPES", "Recipe", "find_recipe"]

RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        *(HQC, HQ_DM, HQ_DM_REFERENCE, EFFICIENTDM, MPQ_DM, MPQ_DMV2, CONVROT, CONVROT_SINGLE, CONVROT_MIXED),
        *(Q_DIFFUSION, QUEST, SVDQUANT, SVDQUANT_GROUPED, TCAQ_DM, GANQ, GANQ_INT8, PASSIONSR, SEGQUANT, RTN),
    )
}
"""Every recipe by its name."""


def find_recipe(name: str) -> Recipe:
    """The recipe of that name, or the one in a YAML file: a name that ends in .yaml or .yml, or has a slash.

    Raises:
        PlanError, PipelineTextError: if there is none, or the file holds none.
    """
    if name.endswith((".yaml", ".yml")) or "/" in name:
        return read_recipe(Path(name))
    if name not in RECIPES:
        known = ", ".join(RECIPES)
        raise PlanError(f"recipe {name!r}", f"unknown; there are {known}", "Use one of them, or a .yaml file.")
    return RECIPES[name]
