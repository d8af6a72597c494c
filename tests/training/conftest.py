"""Shared fixtures: the tiny guided denoiser, captured, and its calibrated student."""

import pytest
import torch
from diffusers import DDIMScheduler
from guided_denoiser import Denoiser, Settings, quantised, task_with

from hqc.capture import trace
from hqc.capture.sources import Source
from hqc.program import InputSpec, Origin, Program
from hqc.recipes import find_recipe
from hqc.sampling import Task


@pytest.fixture(scope="session")
def teacher() -> Program:
    torch.manual_seed(11)
    inputs = (
        InputSpec("sample", ("N", 4, 4, 4)),
        InputSpec("timestep", ("N",)),
        InputSpec("condition", ("N", 1, 32)),
    )
    return trace(Source(Denoiser(), inputs, Origin(source="denoiser")))


@pytest.fixture(scope="session")
def task() -> Task:
    return task_with(DDIMScheduler)


@pytest.fixture(scope="session")
def student(teacher: Program, task: Task) -> Program:
    return quantised(teacher, task, find_recipe("hq-dm"))


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings()
