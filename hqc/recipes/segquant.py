"""SegQuant: parts of a tensor that differ get scales of their own, found in the graph (CVPR 2026, arXiv 2507.14811).

    op([x_0; x_1], W) = op(x_0, W_0) + op(x_1, W_1)            a layer that reads a concatenation (SegLinear)
    op(x, W)          = op(max(x, 0), W) + op(min(x, 0), W)    a layer right behind SiLU or GELU (DualScale)

Rounding to nearest on the graph after both rewrites: `rtn` with `split_concat` and `split_signs`. Both are exact before
anything is quantised; each part is a site of its own with an integer product in every export, and its price is that
product and, for signs, a second copy of the weight. SegQuant's third pattern, a linear layer whose output is cut into
chunks, needs no step: every output channel has a weight scale of its own here.

Own choices: convolutions too (the paper splits linear layers), as a UNet's concatenations and SiLUs are read by those;
two integer products for the two signs (the released code has a kernel that picks the scale by sign); scales by MSE
search, a scale a timestep for activations, where the paper takes the largest value or combines with GPTQ, SmoothQuant
or SVDQuant and argues against scales by timestep, which a compiler does not see: here they are an input that the graph
looks up. No rotation, which would mix the signs again.
"""

from hqc.passes import SplitConcat, SplitSigns
from hqc.recipes.recipe import Recipe
from hqc.recipes.rtn import RTN

__all__ = ["SEGQUANT"]

_DROP, *_REST = RTN.steps

SEGQUANT = Recipe(
    name="segquant",
    source="arXiv 2507.14811",
    steps=(_DROP, SplitConcat(), SplitSigns(), *_REST),
    doc=__doc__,
)
