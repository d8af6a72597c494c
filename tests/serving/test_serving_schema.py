"""schemathesis over the server's own OpenAPI: no 500, every answer as it is described, what breaks the schema refused.

A body that keeps to the schema may be refused all the same: a preview needs a stream, 1.0 is no integer, blanks alone
are no prompt, and one for the digits must name one.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fake_backend import SIZE, FakeBackend
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi.checks import positive_data_acceptance

from hqc.needs import Needs
from hqc.serving.app import Served, create_app
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits

GENERATIONS = "/v1/images/generations"
LIMITS = Limits(max_images=3, max_steps=20)
GUIDED = frozenset({"guidance_scale"})
NEEDS = {
    "digits": FakeBackend.needs,
    "prompt": Needs("StableDiffusionPipeline", "prompt", 0, GUIDED | {"negative_prompt"}, (SIZE, SIZE)),
    "class": Needs("DiTPipeline", "class_label", 5, GUIDED, (SIZE, SIZE)),
    "nothing": Needs("DDPMPipeline", "nothing", 0, frozenset(), (SIZE, SIZE)),
}
ASKED: dict[str, dict[str, Any]] = {
    "digits": {"prompt": "7"}, "prompt": {"prompt": "a cat"}, "class": {"class_label": 4}, "nothing": {}
}  # fmt: skip
DRAWN = {"digits": 0, "prompt": 8, "class": 5, "nothing": 8}
"""Of 30 bodies that keep to the schema, at least so many are answered 200. Words that name a digit are hardly found."""


class Shown(FakeBackend):
    """Takes what any of the models asks for."""

    def __init__(self, needs: Needs) -> None:
        super().__init__()
        self.needs = needs
        if not needs.digits:
            self.schedulers = self.loras = ()


@pytest.fixture(scope="module", params=NEEDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def backend(kind: str) -> FakeBackend:
    return Shown(NEEDS[kind])


@pytest.fixture(scope="module")
def api(backend: FakeBackend) -> Iterator[Any]:
    app = create_app([Served(backend, "fake", "fake")], limits=LIMITS, rules=Rules(hosts=("*",)))
    yield schemathesis.openapi.from_asgi("/openapi.json", app)
    app.state.engines[0].close()


def test_every_answer_is_as_described(api: Any, kind: str) -> None:
    operations = [found.ok() for found in api.get_all_operations()]
    assert {operation.path for operation in operations} >= {GENERATIONS, "/v1/models", "/health"}
    for operation in operations:
        if operation.body:
            assert _tried(operation, schemathesis.GenerationMode.POSITIVE)[200] >= DRAWN[kind]
            assert _tried(operation, schemathesis.GenerationMode.NEGATIVE)[200] == 0
        elif kind == "digits":  # those without a body are the same for every model
            _tried(operation, schemathesis.GenerationMode.POSITIVE)


def test_streams_are_as_described(api: Any, kind: str, backend: FakeBackend) -> None:
    operation = api[GENERATIONS]["POST"]
    body = {**ASKED[kind], "stream": True, "partial_images": 2}
    for failure, events in ((None, ["partial_image", "partial_image", "completed"]), (RuntimeError("once"), ["error"])):
        backend.failure = failure
        answer = operation.Case(body=body, media_type="application/json").call_and_validate()
        assert answer.headers["content-type"] == ["text/event-stream; charset=utf-8"]
        found = [line.rpartition(".")[2].rpartition(" ")[2] for line in answer.text.splitlines() if line[:5] == "event"]
        assert found == events
    backend.failure = None


def _tried(operation: Any, mode: Any) -> Counter[int]:
    """How many answers had which status."""
    seen: Counter[int] = Counter()

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
        answer = case.call_and_validate(excluded_checks=[positive_data_acceptance])
        seen[answer.status_code] += 1

    run()
    return seen
