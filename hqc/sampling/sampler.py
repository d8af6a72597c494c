"""The settings of a sampler: how many steps, how much guidance, how much noise."""

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from hqc.steps import check_options

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Steps of the schedule, classifier-free guidance (none up to 1), DDIM's η (0 deterministic, 1 DDPM's noise)."""

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 1.5
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0

    def __post_init__(self) -> None:
        check_options(self)
