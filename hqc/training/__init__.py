"""Calibration along the float trajectory, and the distillation loop that trains a quantised graph against it."""

from hqc.training.calibration import calibrate
from hqc.training.distillation import StepRecord, distil
from hqc.training.task import Task, guided
from hqc.training.task_sources import class_conditional_task, pipeline_task, synthetic_task

__all__ = [
    "StepRecord",
    "Task",
    "calibrate",
    "class_conditional_task",
    "distil",
    "guided",
    "pipeline_task",
    "synthetic_task",
]
