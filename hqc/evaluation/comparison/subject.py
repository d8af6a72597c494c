"""The program that recipes are compared on, its pipeline, and how images are drawn from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from hqc.errors import EvaluationError
from hqc.evaluation.metrics import check_enough
from hqc.evaluation.sampling import describe_prompts
from hqc.models.classifier import FEATURE_DIM
from hqc.needs import Needs
from hqc.program import Program
from hqc.runtimes import load
from hqc.runtimes.model import Model
from hqc.sampling import Task
from hqc.storage import check_manifest

__all__ = ["FOLLOWED", "Protocol", "Subject", "protocol_of", "source_files"]

FOLLOWED = 64
"""Images that gain and cosine by timestep are measured on, each sampled three times."""


@dataclass(frozen=True)
class Protocol:
    """How images are drawn, the same way from every model.

    images: of one seed of the comparison. rows: classes or numbers of prompts, in turns. sampler: num_inference_steps,
    guidance_scale, eta. at_once: images of one call. scored: whether a classifier is asked; if not, why.
    """

    images: int
    rows: tuple[int, ...]
    sampler: Mapping[str, Any]
    at_once: int
    scheduler: str = ""
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    why_unscored: str = ""

    @property
    def scored(self) -> bool:
        """Whether there is a classifier, and images enough for its figures."""
        return not self.why_unscored

    def labels(self, count: int) -> tuple[int, ...]:
        """What the first so many images show."""
        return tuple(self.rows[i % len(self.rows)] for i in range(count))

    def seeds(self, number: int) -> tuple[int, ...]:
        """The image seeds of seed `number` of the comparison: the same for every recipe."""
        return tuple(range(1000 * number, 1000 * number + self.images))

    @property
    def options(self) -> dict[str, Any]:
        """The keywords of `sample_images` besides labels, seeds and batch size."""
        return {**self.sampler, "prompts": self.prompts, "negative_prompt": self.negative_prompt}

    def to_dict(self) -> dict[str, Any]:
        """As JSON data: what decides the images."""
        asked = {"prompts": describe_prompts(self.prompts)} if self.prompts else {}
        away = {"negative_prompt": self.negative_prompt} if self.negative_prompt else {}
        own = {"images": self.images, "rows": list(self.rows), "at_once": self.at_once, "scheduler": self.scheduler}
        return {**own, **self.sampler, **asked, **away}


def why_unscored(needs: Needs, images: int) -> str:
    """Why no classifier is asked; empty if it is."""
    if not needs.digits:
        return "there is no classifier of these images"
    try:
        check_enough(images, FEATURE_DIM)
    except EvaluationError as error:
        return error.found
    return ""


def source_files(folder: Path) -> dict[str, str]:
    """What a captured program holds, its pipeline's files too: their hashes by name.

    Raises:
        ArtefactError: if it is none, or damaged.
    """
    files = check_manifest(folder, "hqc-program")["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name != "history.json"}


@dataclass(frozen=True)
class Subject:
    """A captured program in its folder, what is sampled around it, its pipeline, and the folder that is made from."""

    path: Path
    program: Program
    task: Task
    pipeline: Any
    pipeline_folder: Path | None

    def pipeline_of(self, artefact: Path) -> Any:
        """The pipeline with another denoiser: a Program, or an export in ONNX Runtime."""
        model: Model = load(artefact, threads=torch.get_num_threads())
        return replace(model, pipeline_folder=self.pipeline_folder).pipeline()


def protocol_of(
    needs: Needs,
    scheduler: str,
    images: int,
    rows: Sequence[int],
    sampler: Mapping[str, Any],
    prompts: tuple[str, ...] = (),
    negative_prompt: str = "",
) -> Protocol:
    """The protocol for a pipeline with these needs."""
    return Protocol(
        images,
        tuple(rows),
        dict(sampler),
        needs.at_once,
        scheduler,
        prompts,
        negative_prompt,
        why_unscored(needs, images),
    )
