"""Every step that a recipe may have, and every part of one, by the names that files and texts use."""

from collections.abc import Mapping

from hqc.calibration import (
    CalibrateActivations,
    CalibrateWeights,
    ChooseRotation,
    ChooseSoftmax,
    Decompose,
    FitLookup,
    InitLora,
    MixChannelBits,
    Smooth,
)
from hqc.passes import (
    AttachBranch,
    AttachLora,
    DropSingleKeyAttention,
    FinetuneOnly,
    InsertAttentionQdq,
    InsertHadamard,
    InsertQdq,
    InsertSmoothing,
    OpenAttention,
    SelectLayers,
    SplitConcat,
    SplitSigns,
)
from hqc.steps import step_name
from hqc.training import LOSSES, Distil, Group, LearnBounds, LearnFactors, Reconstruct

__all__ = ["PARTS", "STEPS"]

STEPS: Mapping[str, type] = {
    step_name(kind): kind
    for kind in (
        DropSingleKeyAttention,
        OpenAttention,
        SplitConcat,
        SplitSigns,
        SelectLayers,
        InsertSmoothing,
        AttachBranch,
        Smooth,
        InsertHadamard,
        ChooseRotation,
        InsertQdq,
        FinetuneOnly,
        LearnFactors,
        InsertAttentionQdq,
        MixChannelBits,
        Decompose,
        FitLookup,
        CalibrateWeights,
        CalibrateActivations,
        ChooseSoftmax,
        Reconstruct,
        AttachLora,
        InitLora,
        Distil,
        LearnBounds,
    )
}
"""Steps, in the order in which recipes have them."""

PARTS: Mapping[str, type] = {step_name(Group): Group, **LOSSES}
"""What options of steps hold."""
