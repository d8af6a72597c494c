"""What training lowers, one loss a file: functions of what the student and the teacher have computed."""

from collections.abc import Mapping

from hqc.steps import step_name
from hqc.training.losses.both_halves import BothHalves
from hqc.training.losses.guided_noise import GuidedNoise
from hqc.training.losses.in_image_space import InImageSpace
from hqc.training.losses.local_output import LocalOutput
from hqc.training.losses.queue_relation import QueueRelation
from hqc.training.losses.seen import Seen, Values
from hqc.training.losses.temporal_relation import TemporalRelation

__all__ = [
    "LOSSES",
    "BothHalves",
    "GuidedNoise",
    "InImageSpace",
    "LocalOutput",
    "Loss",
    "QueueRelation",
    "Seen",
    "TemporalRelation",
    "Values",
]

Loss = BothHalves | GuidedNoise | InImageSpace | LocalOutput | QueueRelation | TemporalRelation
"""Any of the losses: called with what student and teacher have computed; see `Term`."""

_KINDS = (BothHalves, GuidedNoise, InImageSpace, LocalOutput, TemporalRelation, QueueRelation)
LOSSES: Mapping[str, type] = {step_name(kind): kind for kind in _KINDS}
"""Every loss by the name that recipes use."""
