"""Training a quantised graph against the float graph: the loop, its losses, and which tensors learn how."""

from hqc.training.distil import Distil
from hqc.training.groups import Group
from hqc.training.learn_bounds import LearnBounds
from hqc.training.learn_factors import LearnFactors
from hqc.training.losses import (
    LOSSES,
    BothHalves,
    GuidedNoise,
    InImageSpace,
    LocalOutput,
    QueueRelation,
    TemporalRelation,
)
from hqc.training.reconstruct import Reconstruct

__all__ = [
    "LOSSES",
    "BothHalves",
    "Distil",
    "Group",
    "GuidedNoise",
    "InImageSpace",
    "LearnBounds",
    "LearnFactors",
    "LocalOutput",
    "QueueRelation",
    "Reconstruct",
    "TemporalRelation",
]
