"""Tiny pipelines of every kind around their captured denoisers."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from image_pipelines import IMAGE_PIPELINES, save_image_pipeline
from text_pipelines import save_text_pipeline

import hqc

__all__ = ["captured_pipelines"]


def captured_pipelines(
    folders: pytest.TempPathFactory, traced: Mapping[str, Mapping[str, Any]]
) -> Callable[[str], Any]:
    """The pipeline of a name around its captured denoiser, captured once; `traced` has options of `hqc.trace`."""
    made: dict[str, Any] = {}

    def pipe(name: str) -> Any:
        if name not in made:
            work = folders.mktemp(name)
            images = name in IMAGE_PIPELINES
            folder = save_image_pipeline(name, work / "p") if images else save_text_pipeline(name, work)
            hqc.save_program(hqc.trace(folder, **traced.get(name, {})), work / "x.hqc", pipeline=folder)
            made[name] = hqc.load(work / "x.hqc").pipeline()
        return made[name]

    return pipe
