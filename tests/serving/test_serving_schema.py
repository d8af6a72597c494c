"""schemathesis over the server's own OpenAPI: no 500, every answer as it is described, what breaks the schema refused.

A body that keeps to the schema may be refused all the same: a prompt must name a digit, a preview needs a stream.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_backend import FakeBackend
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hqc.serving.app import Served, create_app
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits

LIMITS = Limits(max_images=3, max_steps=20)


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    app = create_app([Served(FakeBackend(), "fake", "fake")], limits=LIMITS, rules=Rules(hosts=("*",)))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    app.state.engines[0].close()


def test_every_answer_is_as_described(api: Any) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.path for operation in operations} >= {"/v1/images/generations", "/v1/models", "/health"}
    for operation in operations:
        _try(operation, schemathesis.GenerationMode.POSITIVE)
        if operation.body:
            _try(operation, schemathesis.GenerationMode.NEGATIVE)


def _try(operation: Any, mode: Any) -> None:
    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=30,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def run(case: Any) -> None:
        case.call_and_validate(excluded_checks=[positive_data_acceptance])

    run()
