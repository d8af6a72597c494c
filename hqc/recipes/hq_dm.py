"""HQ-DM: single Hadamard transformation QAT (arXiv 2512.05746).

    Y = Ĥ·Q_a(Ĥ·X; s_t) · Q_w(W + B·A; s_w) + bias             the weight keeps its own grid; one s_t a timestep
      = (s_t·s_w/√b)·int_op(q_a, q_w·H_b) + bias               what the export runs
    L = Σ (ε̂ - ε)²  along the teacher's trajectory             LoRA rate ∝ mean s_w of its layer (scale-aware)

`hq-dm-reference` is as the reference implementation: tokens unrotated, shortcuts and downsamplers float.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights
from hqc.passes import AttachLora, DropSingleKeyAttention, InsertHadamard, InsertQdq, SelectLayers
from hqc.recipes.recipe import Recipe
from hqc.training import Distil, Group

__all__ = ["HQ_DM", "HQ_DM_REFERENCE"]

HQ_DM = Recipe(
    name="hq-dm",
    source="arXiv 2512.05746",
    steps=(
        DropSingleKeyAttention(),
        SelectLayers(),
        InsertHadamard(block=32),
        InsertQdq(),
        CalibrateWeights(),
        CalibrateActivations(),
        AttachLora(rank=32, seed=3407),
        Distil(
            groups=(
                Group("*.lora_?", rate=3e-2, relative="weight_scale", decay=0.01),
                Group("*.weight_scale", rate=1e-5, positive=True),
                Group("*.activation_scale_table", rate=1e-3, positive=True),
            )
        ),
    ),
    doc=__doc__,
)

HQ_DM_REFERENCE = (
    HQ_DM.named("hq-dm-reference").having("select_layers", rules="reference").having("insert_hadamard", tokens=False)
)
