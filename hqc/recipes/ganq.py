"""GANQ with whole tables: codes into a table of 2ⁿ int8 numbers for every output channel (ICML 2025, arXiv 2501.12956).

    Ŵ_oj = s_o·T_o[Q_oj],  T_o: 2ⁿ whole numbers                min ‖(W - Ŵ)·Xᵀ‖²: codes by back substitution, tables by
    Y = Q_a(X; s_t)·Ŵ + bias                                   least squares, in turns; the best of the turns is kept

The paper's tables are real numbers and its activations float, so that a product needs the weight in floating point.
Here the table is rounded to an int8 grid with one scale a channel: the codes are int8 with 16 different values a row at
four bits, and the product is an integer one in every target. X is what the site reads along the float trajectory,
windows of a convolution as rows.

Own choices: whole tables; activations quantised as in `rtn`; the alternation starts at the uniform grid, so that it is
never worse by the error it lowers, and at k-means of the row with H's diagonal as weights, and each row keeps the
better end; a ridge of 1 % on H; no outliers in float (0.5 % in the paper's GANQ*). Exports store the codes as int8, a
byte each: four bits are what indices and table would take, and what tables of sizes count.
"""

from hqc.calibration import CalibrateActivations, FitLookup
from hqc.passes import DropSingleKeyAttention, InsertQdq, SelectLayers
from hqc.recipes.recipe import Recipe

__all__ = ["GANQ", "GANQ_INT8"]

_GANQ = """GANQ: codes into tables of 2ⁿ real numbers by output channel, weights only (ICML 2025, arXiv 2501.12956).

    Ŵ_oj = T_o[Q_oj],  T_o: 2ⁿ real numbers                     min ‖(W - Ŵ)·Xᵀ‖²: codes by back substitution, tables by
    Y = X·Ŵ + bias                                             least squares, in turns; the best of the turns is kept

Activations stay float, whatever width is asked for: rows of tables say a16. What is saved is size: files hold indices
of n bits, 4 as stored, and tables. No product gets faster: the portable and the onnxruntime export look the weight up
in the graph, which a runtime folds into floats when it loads; the TensorRT export holds floats; torch-cuda refuses.
X is what the site reads along the float trajectory, windows of a convolution as rows.

Own choices: the alternation starts at the uniform grid, so that it is never worse by the error it lowers, and at
k-means of the row with H's diagonal as weights, and each row keeps the better end; a ridge of 1 % on H; no outliers in
float (0.5 % in the paper's GANQ*); tables in float32; edge layers, which have 8 bits in other recipes, stay float.
"""

GANQ_INT8 = Recipe(
    name="ganq-int8",
    source="arXiv 2501.12956",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(),
        InsertQdq(weight="lookup"),
        FitLookup(),
        CalibrateActivations(),
    ),
    doc=__doc__,
)

GANQ = Recipe(
    name="ganq",
    source="arXiv 2501.12956",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(),
        InsertQdq(activation="float", weight="lookup"),
        FitLookup(rounds=10),
    ),
    doc=_GANQ,
)
