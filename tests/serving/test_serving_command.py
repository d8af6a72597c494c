"""`hqc serve`: what its options and their defaults let a client ask for."""

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from fake_backend import FakeBackend
from fastapi.testclient import TestClient

from hqc.cli import main
from hqc.serving.app import Served
from hqc.serving.limits import Limits
from hqc.serving.server import bind_socket

GENERATIONS = "/v1/images/generations"


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `hqc serve` with options, and gives the status of a request to what it would have served."""

    def run(*options: str, **body: Any) -> tuple[int, Limits]:
        answers = []

        def serve(app: Any, *, limits: Limits, **_: Any) -> None:
            with TestClient(app, base_url="http://localhost") as client:
                answers.append((client.post(GENERATIONS, json={"prompt": "7", **body}).status_code, limits))

        monkeypatch.setattr("hqc.serving.server.serve", serve)
        monkeypatch.setattr("hqc.commands.serve.served_runtime", lambda *_: "torch")
        monkeypatch.setattr("hqc.serving.opening.opened", lambda *_, **__: Served(FakeBackend(), "fake", "torch"))
        done = CliRunner().invoke(main, ["serve", "fake", "--port", "0", *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return answers[0]

    return run


def test_the_defaults_take_as_many_images_as_clients_of_the_images_api_ask_for(asked: Any) -> None:
    status, limits = asked(n=10, num_inference_steps=1)
    assert (status, limits) == (200, Limits())
    assert asked(n=11, num_inference_steps=1)[0] == 400


def test_a_thousand_steps_can_be_allowed(asked: Any) -> None:
    assert asked(num_inference_steps=1000)[0] == 400
    assert asked("--max-steps", "1000", num_inference_steps=1000)[0] == 200


def test_body_size_and_connections(asked: Any) -> None:
    status, limits = asked("--max-body-bytes", "1024", "--max-connections", "7", user="x" * 250, prompt="7" + " " * 999)
    assert (status, limits.max_connections) == (413, 7)


def test_a_port_in_use_is_refused_before_the_model_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hqc.serving.opening.opened", None)
    with bind_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        refused = CliRunner().invoke(main, ["serve", "fake", "--port", str(port)], catch_exceptions=False)
    assert refused.exit_code == 2
    assert refused.stderr.startswith(f"hqc: 127.0.0.1:{port}: the port is in use. ")


def test_the_port_is_free_again_where_the_model_cannot_be_read(tmp_path: Path) -> None:
    with bind_socket("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    refused = CliRunner().invoke(main, ["serve", str(tmp_path), "--port", str(port)], catch_exceptions=False)
    assert refused.exit_code == 2
    assert str(tmp_path) in refused.stderr
    bind_socket("127.0.0.1", port).close()
