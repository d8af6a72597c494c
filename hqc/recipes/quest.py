"""QuEST: a few weights finetuned, time embedding first, then attention and feed-forward (ICCV 2025, arXiv 2402.03666).

    Y = Q_a(X; s_g, z_g) · Q_w(W; s_w) + bias                  one (s, z) for a group g of neighbouring timesteps
    stage 1   L = Σ_time ‖O_l - Ô_l‖² + 2·Σ (ε̂ - ε)²          the time embedding's layers and their projections learn
    stage 2   L = Σ_attn ‖O_l - Ô_l‖² + 2·Σ (ε̂ - ε)²          queries, keys, values and feed-forward learn

Both start from Q-Diffusion's rounding. What learns: the weights of these layers and their activation scales, at most
7 % of the parameters in both stages together; every other tensor stays as calibrated, to the bit. Where the layers
are more, the kinds take turns, smallest first; `hqc explain` says of each one that is left out what it would make. A
model without attention, or without layers that are called like a time embedding's, has one stage; it says that too.

Below 6 bits the paper scales each input channel of an activation. No integer product takes that, so the scales are
factors here, δ_c/δ_ref, which go into the weight before it is quantised (`insert_smoothing`, `smooth`). How much of
them is chosen by output error: all of it, `--set smooth.by=activation_range`, was worse on `digits` than none.

Where paper and released code disagree: the paper has one set of activation parameters for all timesteps, the code one a
group; `--set insert_qdq.groups=1` is the paper's. The code's stage 2 leaves out the local loss and adds the global one
once a layer; the paper has both.

Own choices: the grid has five groups; rates are relative to the grid (the paper's are 1e-5 and 1e-4, with 2 200 to
32 000 updates); attention's products stay float; zero points stay as calibrated; layers of the time embedding itself
keep their 8 bits.
"""

from hqc.calibration import CalibrateActivations, CalibrateWeights, Smooth
from hqc.passes import DropSingleKeyAttention, FinetuneOnly, InsertQdq, InsertSmoothing, SelectLayers, SplitConcat
from hqc.recipes.recipe import Recipe
from hqc.training import Distil, Group, GuidedNoise, LocalOutput, Reconstruct

__all__ = ["QUEST"]

_TIME = ("*time_emb*", "*emb_layers.*", "*timestep_embedder.linear_*")
_ATTENTION = ("*.to_q", "*attn1.to_[kv]", "*attentions.?.to_[kv]", "*.ff.net.*")


def _stage(sites: tuple[str, ...], epochs: int) -> Distil:
    """Finetunes these layers by their own outputs and by the noise."""
    weights = tuple(Group(f"{p}.weight{end}", 1e-2, "weight_scale") for p in sites for end in ("", "_smoothed"))
    tables = tuple(Group(f"{p}.activation_scale_table", 5e-3, "own", positive=True) for p in sites)
    losses = (LocalOutput(sites), GuidedNoise(weight=2.0))
    return Distil(losses, (*weights, *tables), epochs=epochs, order="shuffled", optional=True)


QUEST = Recipe(
    name="quest",
    source="arXiv 2402.03666",
    steps=(
        DropSingleKeyAttention(),
        SplitConcat(),
        SelectLayers(rules="all"),
        InsertSmoothing(most_bits=5),
        Smooth(by="grid", candidates=19, rows=32, activation="asymmetric"),
        InsertQdq(activation="asymmetric", groups=5),
        FinetuneOnly(sites=(*_TIME, *_ATTENTION), share=0.07),
        CalibrateWeights(),
        Reconstruct(learn="rounding"),
        CalibrateActivations(samples=16, candidates=80, power=2.4),
        _stage(_TIME, epochs=10),
        _stage(_ATTENTION, epochs=20),
    ),
    doc=__doc__,
)
