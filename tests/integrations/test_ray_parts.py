"""What of the Ray integration needs no Ray: scaling, health, and what a deployment is told, over a stand-in for it."""

import importlib
import sys
from collections.abc import Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from hqc.errors import OptionError
from hqc.serving.limits import Limits

NAME = "hqc.integrations.ray"


class Serve:
    """`ray.serve`, as far as an application is made with it; it remembers what a deployment is told."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {}
        self.builder: Any = None

    def ingress(self, builder: Any) -> Any:
        self.builder = builder
        return lambda replica: replica

    def deployment(self, replica: Any, **told: Any) -> Any:
        self.told = told
        return SimpleNamespace(bind=lambda: replica)


@pytest.fixture
def serve() -> Serve:
    return Serve()


@pytest.fixture
def module(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The integration, imported with the stand-in, whether Ray is there or not."""
    ray = ModuleType("ray")
    ray.serve = serve  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = sys.modules.pop(NAME, None)
    yield importlib.import_module(NAME)
    sys.modules.pop(NAME)
    if before is not None:
        sys.modules[NAME] = before


def test_replicas_are_a_number_or_scale_by_the_batch(module: Any) -> None:
    assert module._scaling((3, 3), 8) == {"num_replicas": 3}
    assert module._scaling((1, 4), 8) == {
        "autoscaling_config": {"min_replicas": 1, "max_replicas": 4, "target_ongoing_requests": 8}
    }


def test_a_replica_whose_engine_has_stopped_is_ill(module: Any) -> None:
    replica = module._Replica()
    engines = [SimpleNamespace(alive=True), SimpleNamespace(alive=True)]
    replica.app = SimpleNamespace(state=SimpleNamespace(engines=engines))
    replica.check_health()
    engines[1].alive = False
    with pytest.raises(RuntimeError, match="the engine has stopped; the replica's log has why"):
        replica.check_health()


@pytest.mark.parametrize("replicas", [(0, 1), (3, 2)])
def test_replicas_that_make_no_sense(module: Any, replicas: tuple[int, int]) -> None:
    with pytest.raises(OptionError, match="replicas"):
        module.application("digits", replicas=replicas)


def test_what_a_deployment_is_told(module: Any, serve: Serve) -> None:
    limits = Limits(max_batch=4, max_queue=6, shutdown_s=2.0)
    module.application("digits", replicas=(2, 2), resources=module.Resources(3, 0.5), limits=limits)
    assert serve.told == {
        "name": "hqc",
        "num_replicas": 2,
        "max_ongoing_requests": 10,  # the line of one replica; Ray keeps the rest
        "ray_actor_options": {"num_cpus": 3, "num_gpus": 0.5},
        "health_check_period_s": module.HEALTH_S,
        "graceful_shutdown_timeout_s": 2.0 + module.HEALTH_S,
    }


def test_a_replica_builds_the_application_with_its_own_cores(
    module: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hqc.serving import app, opening

    asked: list[Any] = []
    monkeypatch.setattr(opening, "opened", lambda *given, **options: asked.append((given, options)) or "model")
    monkeypatch.setattr(app, "create_app", lambda models, **options: (models, options["limits"]))
    limits = Limits(max_batch=4)
    module.application("digits", runtime="torch", resources=module.Resources(3), limits=limits)
    assert serve.builder() == (["model"], limits)
    assert asked == [(("digits", "torch"), {"cores": 3})]
