"""What a denoiser is run on: tasks from pipelines, prompts or noise, and the sampler's trajectory."""

from hqc.sampling.sampler import Sampler
from hqc.sampling.sources import class_conditional_task, pipeline_task, synthetic_task
from hqc.sampling.task import Task, guided
from hqc.sampling.work import Observe, Update, Validation, Work, evenly

__all__ = [
    "Observe",
    "Sampler",
    "Task",
    "Update",
    "Validation",
    "Work",
    "class_conditional_task",
    "evenly",
    "guided",
    "pipeline_task",
    "synthetic_task",
]
