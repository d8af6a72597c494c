"""The settings of a sampler: how many steps, how much guidance, how much noise."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any

from pydantic import Field

from hqc.steps import check_options

__all__ = ["Sampler"]


@dataclass(frozen=True)
class Sampler:
    """Steps of the schedule, classifier-free guidance (none up to 1), DDIM's η (0 deterministic, 1 DDPM's noise).

    timestep: of a model that is called once, whatever the number of steps: it makes an image in one step.
    """

    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 20
    guidance_scale: Annotated[float, Field(ge=0, le=100)] = 1.5
    eta: Annotated[float, Field(ge=0, le=1)] = 0.0
    timestep: Annotated[float, Field(ge=0, le=1000)] | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def settings(self) -> dict[str, Any]:
        """Its options as JSON data, without a timestep that there is not."""
        return {name: value for name, value in asdict(self).items() if value is not None}
