"""Tiny pipelines of every kind around their captured denoisers."""

from collections.abc import Callable
from typing import Any

import pytest
from tiny_pipeline import saved_pipeline, traced_pipeline

import hqc

__all__ = ["captured_pipelines"]


def captured_pipelines(folders: pytest.TempPathFactory) -> Callable[[str], Any]:
    """The pipeline of a name around its captured denoiser, opened once."""
    made: dict[str, Any] = {}

    def pipe(name: str) -> Any:
        if name not in made:
            folder = folders.mktemp(name) / "x.hqc"
            hqc.save_program(traced_pipeline(name), folder, pipeline=saved_pipeline(name))
            made[name] = hqc.load(folder).pipeline()
        return made[name]

    return pipe
