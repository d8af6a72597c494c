"""Training a quantised graph against the float graph: the loop, its losses, and which tensors learn how."""

from hqc.training.distil import Distil
from hqc.training.groups import Group
from hqc.training.losses import LOSSES, BothHalves, GuidedNoise, QueueRelation, TemporalRelation
from hqc.training.reconstruct import Reconstruct

__all__ = ["LOSSES", "BothHalves", "Distil", "Group", "GuidedNoise", "QueueRelation", "Reconstruct", "TemporalRelation"]
