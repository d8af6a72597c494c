"""bench-serve: arrivals, what is made of the answers, and a whole run with servers of its own."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from fake_backend import FakeBackend
from hypothesis import given, settings
from hypothesis import strategies as st
from served_app import served

from hqc.cli import main
from hqc.errors import EvaluationError
from hqc.program import Program
from hqc.sampling.sources import synthetic_task
from hqc.serving.backend import Drawing
from hqc.serving.bench.load import Answer, arrivals, offered, saturated
from hqc.serving.bench.report import save_serve_chart, serve_table
from hqc.serving.bench.run import Latency, Measured, Protocol, ServeBench, latency_of
from hqc.serving.engine import Engine
from hqc.serving.latents import LatentBackend
from hqc.serving.limits import Limits


@settings(deadline=None)
@given(st.floats(0.01, 100), st.integers(1, 50), st.integers(1, 20), st.integers(0, 20), st.integers(0, 9))
def test_arrivals_are_the_same_of_a_seed(rate: float, count: int, low: int, more: int, seed: int) -> None:
    found = arrivals(rate, count, (low, low + more), {"x": 1}, seed)
    assert found == arrivals(rate, count, (low, low + more), {"x": 1}, seed)
    assert len(found) == count
    moments = [each.at_s for each in found]
    assert moments == sorted(moments)
    assert all(low <= each.body["num_inference_steps"] <= low + more for each in found)
    assert [each.body["seed"] for each in found] == list(range(count))
    assert all(each.body["x"] == 1 for each in found)


def test_arrivals_are_a_poisson_process() -> None:
    moments = np.array([each.at_s for each in arrivals(4.0, 4000, (1, 1), {}, 0)])
    waits = np.diff(moments)
    # Mean and standard deviation of 4 000 exponential waits: 1/4 each, within four standard errors of 1.6 %.
    assert waits.mean() == pytest.approx(0.25, rel=0.07)
    assert waits.std() == pytest.approx(0.25, rel=0.1)


def test_latencies() -> None:
    answers = [Answer(0.5, 1.0), Answer(None, 2.0), Answer(1.5, 3.0)]
    assert latency_of(answers, 2.0) == Latency(2.0, pytest.approx(2.9), 1.0, pytest.approx(3 / 5))
    assert latency_of([Answer(None, 1.0)], 1.0).first_p50_s is None


def test_clients_against_a_server(start: Any) -> None:
    backend = FakeBackend()
    client = start(backend=backend, max_batch=4)
    port = client.base_url.port
    seen: list[int] = []
    asked = arrivals(200.0, 12, (2, 5), {"class_label": 1, "partial_images": 1}, 3)
    answers = offered(port, asked, seen.append)
    assert seen == list(range(1, 13))
    assert all(0 < (each.first_s or 0) < each.done_s for each in answers)
    assert sorted(drawing.num_inference_steps for drawing in backend.begun) == sorted(
        each.body["num_inference_steps"] for each in asked
    )
    assert saturated(port, asked, 4, seen.append) > 0
    assert len(backend.begun) == 24
    assert max(backend.batches) > 1
    with pytest.raises(EvaluationError, match="answered 400"):
        offered(port, arrivals(100.0, 1, (2, 2), {"class_label": 11}, 0), seen.append)


def test_latents_of_a_program_without_a_pipeline(captured: Callable[[str], Program]) -> None:
    program = captured("digits")
    backend = LatentBackend(_session(program), synthetic_task(program))
    assert (backend.needs.kind, backend.needs.size) == ("nothing", (8, 8))
    assert backend.check_steps(5, None) is None
    assert "1000" in (backend.check_steps(2000, None) or "")
    wanted = [Drawing(0, None, "", seed, 2 + seed % 2, 2.0 if seed else 1.0) for seed in range(3)]

    def draw(max_batch: int) -> list[Any]:
        engine = Engine(backend.denoise, max_batch=max_batch, around=backend.around)
        tickets = [engine.submit([lambda each=each: backend.begin(each)]) for each in wanted]  # type: ignore[misc]
        found = [ticket.result.result(60)[0] for ticket in tickets]
        engine.close()
        return found

    alone, together = draw(1), draw(3)
    for one, other in zip(alone, together, strict=True):
        assert one.shape == (8, 8)
        assert np.abs(one.astype(int) - other).max() <= 1  # float convolutions round by the size of a batch
    assert (alone[0] != alone[2]).any()


def _session(program: Any) -> Any:
    from hqc.runtimes.torch_runtime import TorchSession

    return TorchSession(program)


def measured() -> ServeBench:
    loads = {0.5: Latency(0.5, 1.0, 0.2, 1.0), 1.3: Latency(1.0, 3.0, None, 2.0)}
    speeds = {"adaptive": 4.5, "continuous": 4.0, "static": 3.5, "single": 2.0}
    policies = {policy: Measured(speed, loads) for policy, speed in speeds.items()}
    return ServeBench("m", "onnxruntime", Protocol(shares=(0.5, 1.3)), {0.5: 1.0, 1.3: 2.6}, policies, 1, 2)


def test_table_and_chart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=200).print(serve_table(measured()))
    text = capsys.readouterr().out
    assert "| continuous    |                4.00 |            2.00 |" in text
    assert "0.50 / 1.00 / 0.20" in text
    assert "1.00 / 3.00 / –" in text
    assert "1.00, 2.60 requests/s" in text
    assert "m, onnxruntime, 2 lanes of 1 thread; batch of 8 images" in text
    save_serve_chart(tmp_path / "x.svg", measured())
    assert "4.00  (2.00×)" in (tmp_path / "x.svg").read_text()
    assert measured().to_dict()["policies"]["static"]["against_single"] == 1.75


def test_a_whole_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Over HTTP with a server of the test's own in place of a process a policy, which loads torch each time."""
    started: list[str] = []

    @contextmanager
    def serving(source: Any, policy: str, max_batch: int) -> Any:
        started.append(policy)
        with served(FakeBackend(), Limits(max_batch=max_batch), policy=policy) as client:
            yield client.base_url.port

    monkeypatch.setattr("hqc.serving.bench.run.serving", serving)
    options = ["--requests", "8", "--steps", "2-4", "--json", "--chart", str(tmp_path / "x.png")]
    found = CliRunner().invoke(main, ["bench-serve", "digits", *options])
    assert found.exit_code == 0, found.output
    assert started == ["adaptive", "continuous", "static", "single"] * 2
    data = json.loads(found.stdout)
    assert set(data["policies"]) == {"adaptive", "continuous", "static", "single"}
    assert data["policies"]["single"]["against_single"] == 1
    assert data["protocol"]["steps"] == [2, 4]
    assert set(data["requests_per_s"]) == {"0.5", "0.9", "1.3"}
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("steps", ["0", "10-5", "-3", "1001", "a", "٣"])
def test_steps_that_are_none(steps: str) -> None:
    found = CliRunner().invoke(main, ["bench-serve", "digits", "--steps", steps])
    assert found.exit_code == 2
    assert "--steps" in found.output
