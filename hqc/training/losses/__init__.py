"""What training lowers, one loss a file: functions of what the student and the teacher have computed."""

from collections.abc import Mapping

from hqc.steps import step_name
from hqc.training.losses.guided_noise import GuidedNoise
from hqc.training.losses.seen import Seen

__all__ = ["LOSSES", "GuidedNoise", "Loss", "Seen"]

Loss = GuidedNoise
"""Any of the losses."""

LOSSES: Mapping[str, type] = {step_name(kind): kind for kind in (GuidedNoise,)}
"""Every loss by the name that recipes use."""
