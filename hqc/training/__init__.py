"""Calibration along the float trajectory, and the distillation loop that trains a quantised graph against it."""

from hqc.training.calibration import calibrate
from hqc.training.distillation import StepRecord, distil
from hqc.training.task import Task, class_conditional_task, guided, synthetic_task, unconditional_task

__all__ = [
    "StepRecord",
    "Task",
    "calibrate",
    "class_conditional_task",
    "distil",
    "guided",
    "synthetic_task",
    "unconditional_task",
]
