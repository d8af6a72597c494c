"""A scheduler for all images of a server or a command, in place of the pipeline's own."""

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler

from hqc.errors import OptionError
from hqc.serving.opening import opened
from hqc.serving.schedulers import chosen_scheduler


def test_without_a_name_it_is_the_pipelines_own() -> None:
    own = DDIMScheduler()
    assert chosen_scheduler(own, None) is own


def test_another_takes_its_configuration() -> None:
    found = chosen_scheduler(DDIMScheduler(beta_end=0.5), "euler")
    assert type(found) is EulerDiscreteScheduler
    assert found.config.beta_end == 0.5


def test_what_cannot_stand_for_it_is_refused() -> None:
    with pytest.raises(OptionError) as flow:
        chosen_scheduler(FlowMatchEulerDiscreteScheduler(), "ddim")
    assert flow.value.line == (
        "--scheduler ddim: cannot stand for the pipeline's FlowMatchEulerDiscreteScheduler. Leave it out."
    )


def test_a_server_has_it_where_a_request_names_none() -> None:
    backend = opened("digits", scheduler="euler").backend
    assert type(backend._pipe.scheduler) is EulerDiscreteScheduler  # type: ignore[attr-defined]
    assert "ddim" in backend.schedulers
