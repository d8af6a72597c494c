"""Connections that only cost: idle ones by the hundred, and bodies that go on after their request is answered."""

import socket
import subprocess
import sys
import textwrap
import time
from contextlib import ExitStack
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from fake_backend import FakeBackend
from test_serving_hostile import address, closed, wait_for

from hqc.serving.protocol import UNREAD_BYTES

FEW_FILES = textwrap.dedent(
    """
    import resource
    resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128))
    from fake_backend import FakeBackend
    from hqc.serving.app import Served, create_app
    from hqc.serving.limits import Limits
    from hqc.serving.server import serve

    limits = Limits(head_s=2)
    serve(create_app([Served(FakeBackend(), "few", "fake")], limits=limits), port=0, limits=limits)
    """
)


def test_more_idle_connections_than_files_neither_fill_the_log_nor_the_cpu(tmp_path: Path) -> None:
    log = tmp_path / "log"
    here = Path(__file__).parent
    command = [sys.executable, "-c", FEW_FILES]
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, cwd=here, stdout=subprocess.PIPE, stderr=errors, text=True) as server,
        ExitStack() as stack,
    ):
        try:
            assert server.stdout is not None
            url = server.stdout.readline().split()[2]
            host, port = url.removeprefix("http://").split(":")
            used = psutil.Process(server.pid).cpu_times
            before = sum(used()[:2])
            for _ in range(300):
                idle = stack.enter_context(socket.socket())
                idle.setblocking(False)
                idle.connect_ex((host, int(port)))
            wait_for(lambda: answers(url))
            assert sum(used()[:2]) - before < 1.5  # seconds; those that have been answered and closed among them
        finally:
            server.kill()
    assert log.read_text() == ""


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


LONG = b"Content-Length: 100000000000\r\n\r\n"
UNREAD = {
    200: b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    404: b"POST /nothing HTTP/1.1\r\nHost: localhost\r\n",
    413: b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n",
    415: b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: text/plain\r\n",
}


@pytest.mark.parametrize("status", UNREAD)
def test_a_body_that_nobody_reads_has_an_end_in_time(status: int, start: Any) -> None:
    client = start(backend=FakeBackend(), head_s=0.4, body_s=0.4, max_body_bytes=1)
    with socket.create_connection(address(client), timeout=30) as connection:
        connection.sendall(UNREAD[status] + LONG + b"xx")
        assert answered(connection) == status
        assert sent(connection, b"x", times=400, every=0.05) < 400
    assert client.get("/health").status_code == 200


@pytest.mark.parametrize("status", UNREAD)
def test_a_body_that_nobody_reads_has_an_end_in_size(status: int, start: Any) -> None:
    client = start(backend=FakeBackend())
    times = 2 * UNREAD_BYTES // 2**16
    with socket.create_connection(address(client), timeout=30) as connection:
        connection.sendall(UNREAD[status] + LONG)
        assert sent(connection, b"x" * 2**16, times) < times
    assert client.get("/health").status_code == 200


def test_a_body_that_nobody_reads_but_that_ends_keeps_its_connection(start: Any) -> None:
    """A client that sends its whole body first is told what is wrong, and may ask again; but not stay for nothing."""
    client = start(backend=FakeBackend(), head_s=0.5)
    with socket.create_connection(address(client), timeout=30) as connection:
        connection.sendall(UNREAD[404] + b"Content-Length: 400000\r\n\r\n")
        assert answered(connection) == 404
        assert sent(connection, b"x" * 100_000, times=4, every=0.05) == 4
        connection.sendall(UNREAD[200] + b"\r\n")
        assert answered(connection) == 200
        connection.sendall(UNREAD[404] + b"Content-Length: 2\r\n\r\n")
        assert answered(connection) == 404
        connection.sendall(b"xx")
        assert closed(connection) == b""


def answered(connection: socket.socket) -> int:
    """The status of the next answer, which is read to its end."""
    answer = HTTPResponse(connection)
    answer.begin()
    answer.read()
    return answer.status


def sent(connection: socket.socket, data: bytes, times: int, every: float = 0) -> int:
    """How many times the data could be sent before the server closed the connection."""
    for time_ in range(times):
        try:
            connection.sendall(data)
        except OSError:
            return time_
        time.sleep(every)
    return times
