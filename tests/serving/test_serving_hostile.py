"""Clients that are slow, gone, malformed, too many, or call the server by another name; and a server that stops."""

import gc
import json
import logging
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend

from hqc.serving.guards import LOOPBACK, Rules

GENERATIONS = "/v1/images/generations"
ANSWER = b"HTTP/1.1 200"


@pytest.fixture
def backend() -> Iterator[FakeBackend]:
    made = FakeBackend()
    yield made
    if made.gate is not None:
        made.gate.set()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def address(client: httpx.Client) -> tuple[str, int]:
    return client.base_url.host, client.base_url.port or 0


def closed(connection: socket.socket) -> bytes:
    """What comes until the server closes."""
    connection.settimeout(30)
    found = b""
    try:
        while more := connection.recv(4096):
            found += more
    except ConnectionResetError:
        pass
    return found


def raw(client: httpx.Client, data: bytes) -> bytes:
    with socket.create_connection(address(client), timeout=30) as connection:
        connection.sendall(data)
        return closed(connection)


# ---- who may ask ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io", ""]
)
def test_a_foreign_name_is_refused(host: str, start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend)
    for path in ("/health", GENERATIONS, "/", "/metrics"):
        answer = client.get(path, headers={"Host": host})
        assert answer.status_code == 421
        error = answer.json()["error"]
        assert error["code"] == "host_not_allowed"
        assert "--allowed-host" in error["message"]
    assert backend.begun == []


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:9", "[::1]:80", "localhost."])
def test_loopback_has_several_names(host: str, start: Any, backend: FakeBackend) -> None:
    assert start(backend=backend).get("/health", headers={"Host": host}).status_code == 200


def test_names_can_be_allowed(start: Any, backend: FakeBackend) -> None:
    own = start(backend=backend, rules=Rules(hosts=(*LOOPBACK, "gpu.local")))
    assert own.get("/health", headers={"Host": "gpu.local:8000"}).status_code == 200
    assert own.get("/health", headers={"Host": "x.gpu.local"}).status_code == 421
    assert start(backend=backend, rules=Rules(hosts=("*",))).get("/health", headers={"Host": "a.b"}).status_code == 200


@pytest.mark.parametrize(
    ("header", "status"),
    [
        (None, 401),
        ("Bearer wrong", 401),
        ("Bearer", 401),
        ("Basic s3cret", 401),
        ("Bearer s3cret2", 401),
        ("Bearer s3cre", 401),
        ("Bearer é", 401),
        ("Bearer s3cret", 200),
        ("bearer  s3cret", 200),
    ],
)
def test_a_key(header: str | None, status: int, start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, rules=Rules(api_key="s3cret"))
    headers = {} if header is None else {"Authorization": header.encode("utf-8")}
    answer = client.post(GENERATIONS, json={"prompt": "1"}, headers=headers)
    assert answer.status_code == status
    assert client.get("/v1/models", headers=headers).status_code == status
    if status == 401:
        assert answer.json()["error"]["code"] == "invalid_api_key"
        assert answer.json()["error"]["type"] == "authentication_error"
        assert "s3cret" not in answer.text
        assert backend.begun == []
    assert client.get("/health").status_code == 200


def test_pages_of_other_origins_may_not_ask_unless_they_are_named(start: Any, backend: FakeBackend) -> None:
    asking = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
    closed_server, named = start(backend=backend), start(backend=backend, cors_origins=("https://a.example",))
    assert "access-control-allow-origin" not in closed_server.options(GENERATIONS, headers=asking).headers
    assert named.options(GENERATIONS, headers=asking).headers["access-control-allow-origin"] == "https://a.example"
    asking["Origin"] = "https://b.example"
    assert "access-control-allow-origin" not in named.options(GENERATIONS, headers=asking).headers


def test_a_page_of_a_named_origin_may_read_every_answer(start: Any, backend: FakeBackend) -> None:
    named = "https://a.example"
    client = start(backend=backend, cors_origins=(named,), rules=Rules(api_key="k"))
    key, page = {"Authorization": "Bearer k"}, {"Origin": named}

    def ask(headers: dict[str, str]) -> httpx.Response:
        return client.post(GENERATIONS, json={"prompt": "1"}, headers=headers)

    answers = {200: ask({**key, **page}), 401: ask(page), 421: ask({**key, **page, "Host": "evil.example"})}
    backend.failure = RuntimeError("not foreseen")
    answers[500] = ask({**key, **page})
    for status, answer in answers.items():
        assert answer.status_code == status
        assert answer.headers["access-control-allow-origin"] == named
        assert {"retry-after", "x-request-id"} <= set(
            answer.headers["access-control-expose-headers"].lower().split(", ")
        )
        assert answer.headers["x-request-id"].startswith("req_")
    assert "access-control-allow-origin" not in ask({"Origin": "https://b.example"}).headers


# ---- clients that leave --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_request_at_the_next_step(stream: bool, start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, max_batch=2, max_queue=4)
    backend.gate = threading.Event()
    connection = asking(client, prompt="1", n=1 if stream else 3, num_inference_steps=200, stream=stream)
    assert backend.entered.acquire(timeout=30)
    connection.close()
    time.sleep(0.3)  # the server hears of it while the step is held
    backend.gate.set()
    wait_for(lambda: client.engine.running == 0)
    assert len(backend.batches) <= 3
    assert client.post(GENERATIONS, json={"prompt": "2"}).status_code == 200
    wait_for(lambda: 'status="cancelled"} 1.0' in client.get("/metrics").text)


def asking(client: httpx.Client, **body: Any) -> socket.socket:
    """A connection that has asked for images, and may be closed at any time."""
    content = json.dumps(body).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: "
    connection = socket.create_connection(address(client), timeout=30)
    connection.sendall(head.encode() + str(len(content)).encode() + b"\r\n\r\n" + content)
    return connection


def test_streams_whose_clients_leave_write_nothing_into_the_log(
    start: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    """asyncio tells of tasks that are dropped before they end, once they are collected."""
    client = start(backend=backend)
    backend.gate = threading.Event()
    for _ in range(4):
        with asking(client, prompt="1", num_inference_steps=100, stream=True) as connection:
            assert connection.recv(12) == ANSWER
    backend.gate.set()
    wait_for(lambda: 'status="cancelled"} 4.0' in client.get("/metrics").text)
    gc.collect()
    assert not caplog.records


def test_a_request_whose_client_left_in_the_line_is_never_begun(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, max_batch=1, max_queue=4)
    backend.gate = threading.Event()
    first = threading.Thread(target=lambda: client.post(GENERATIONS, json={"prompt": "1", "num_inference_steps": 2}))
    first.start()
    assert backend.entered.acquire(timeout=30)
    with pytest.raises(httpx.ReadTimeout):
        client.post(GENERATIONS, json={"prompt": "5"}, timeout=0.2)
    time.sleep(0.2)
    backend.gate.set()
    first.join(30)
    wait_for(lambda: client.engine.waiting == 0)
    assert [drawing.label for drawing in backend.begun] == [1]


# ---- clients that are slow, or many --------------------------------------------------------------------------------


def test_connections_that_send_nothing_are_closed(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, head_s=0.3)
    began = time.monotonic()
    assert raw(client, b"") == raw(client, b"POST / HTTP/1.1\r\nHost: loc") == b""
    assert time.monotonic() - began < 10
    assert client.get("/health").status_code == 200


def test_a_head_that_drips_is_closed(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, head_s=0.4)
    began = time.monotonic()
    with socket.create_connection(address(client), timeout=30) as connection, suppress(OSError):
        for byte in b"GET /health HTTP/1.1\r\nX: " + b"x" * 1000:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    assert time.monotonic() - began < 25  # of 50
    assert client.get("/health").status_code == 200


def test_a_request_that_runs_long_is_not_taken_for_a_slow_head(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, head_s=0.2)
    backend.gate = threading.Event()
    threading.Timer(0.8, backend.gate.set).start()
    assert client.post(GENERATIONS, json={"prompt": "1"}).status_code == 200


def test_a_body_that_drips_is_refused(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, body_s=0.3)
    head = b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = raw(client, head + b"Content-Length: 100\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "body_too_slow"


def test_a_connection_too_many_is_closed_and_the_others_work(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, max_connections=3)
    with ExitStack() as stack:
        kept = [stack.enter_context(socket.create_connection(address(client), timeout=30)) for _ in range(3)]
        wait_for(lambda: closed_at_once(address(client)))
        for connection in kept:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            assert closed(connection).startswith(ANSWER)
    assert client.get("/health").status_code == 200


def closed_at_once(where: tuple[str, int]) -> bool:
    with socket.create_connection(where, timeout=30) as connection:
        connection.settimeout(0.5)
        try:
            return connection.recv(1) == b""
        except ConnectionResetError:
            return True
        except TimeoutError:
            return False


@pytest.mark.parametrize(
    "data",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b'Transfer-Encoding: chunked\r\n\r\n5\r\n{"pro\r\nffffffffffffffffffffff\r\n',
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{",
        b"GET /" + b"a" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n",
    ],
    ids=["words", "TLS", "chunk size", "second chunk", "length", "lengths", "long", "two hosts"],
)
def test_what_is_no_http_is_refused_without_a_traceback(
    data: bytes, start: Any, backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    client = start(backend=backend, head_s=1, body_s=1)
    with caplog.at_level(logging.WARNING):
        answer = raw(client, data)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 421"))
    assert not [record for record in caplog.records if record.exc_info]
    assert client.post(GENERATIONS, json={"prompt": "1"}).status_code == 200


def test_a_body_that_ends_early_leaves_no_trace(start: Any, backend: FakeBackend, caplog: Any) -> None:
    client = start(backend=backend)
    head = b"POST " + GENERATIONS.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with caplog.at_level(logging.WARNING):
        with socket.create_connection(address(client), timeout=30) as connection:
            connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
        time.sleep(0.2)
        assert client.get("/health").status_code == 200
    assert not caplog.records


# ---- time, and the end ---------------------------------------------------------------------------------------------


def test_a_request_that_takes_too_long_is_told_so_once(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, request_s=0.05, max_steps=250)
    backend.gate = threading.Event()
    threading.Timer(0.2, backend.gate.set).start()
    answer = client.post(GENERATIONS, json={"prompt": "1"})
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "time_limit"
    assert answer.headers["x-should-retry"] == "false"


def test_a_server_that_stops_ends_what_runs_and_refuses_what_waits(start: Any, backend: FakeBackend) -> None:
    client = start(backend=backend, max_batch=1)
    backend.gate = threading.Event()
    answers: dict[str, httpx.Response] = {}

    def ask(name: str) -> None:
        answers[name] = client.post(GENERATIONS, json={"prompt": "1"})

    running = threading.Thread(target=ask, args=("running",))
    running.start()
    assert backend.entered.acquire(timeout=30)
    waiting = threading.Thread(target=ask, args=("waiting",))
    waiting.start()
    wait_for(lambda: client.engine.waiting == 1)
    client.engine.drain(30)
    assert client.get("/ready").status_code == 503
    assert client.get("/health").json()["status"] == "stopping"
    refused = client.post(GENERATIONS, json={"prompt": "1"})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert int(refused.headers["retry-after"]) >= 1
    backend.gate.set()
    running.join(30)
    waiting.join(30)
    assert (answers["running"].status_code, answers["waiting"].status_code) == (200, 503)


PROGRAM = textwrap.dedent(
    """
    import time
    from fake_backend import FakeBackend
    from hqc.serving.app import Served, create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve

    class Slow(FakeBackend):
        def denoise(self, calls, at_once=1):
            time.sleep(0.05)
            print("step", flush=True)
            return super().denoise(calls, at_once)

    limits = Limits(shutdown_s=0.5, max_steps=1000)
    serve(create_app([Served(Slow(), "slow", "fake")], limits=limits), port=0, limits=limits)
    print("returned", flush=True)
    """
)


def test_a_signal_ends_a_long_request_within_the_grace() -> None:
    here = Path(__file__).parent
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", PROGRAM], cwd=here, text=True, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            url = line.split()[2]
            answers = []
            body = {"prompt": "1", "num_inference_steps": 1000}
            asking = threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}{GENERATIONS}", json=body, trust_env=False, timeout=60))
            )
            asking.start()
            assert process.stdout.readline() == "step\n"
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
            assert time.monotonic() - began < 15  # 50 s of steps were left
            asking.join(30)
            assert answers[0].status_code == 503
            assert process.stdout.read().endswith("returned\n")
            assert "Traceback" not in (process.stderr.read() if process.stderr else "")
        finally:
            process.kill()
