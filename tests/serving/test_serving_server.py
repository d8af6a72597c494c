"""Addresses that cannot be had, and a server process that stops on a signal."""

import json
import signal
import socket
import subprocess
import sys
import textwrap
import urllib.request
from pathlib import Path

import httpx
import pytest
from fake_backend import FakeBackend

from hqc.serving.app import Served, create_app
from hqc.serving.errors import ServingError
from hqc.serving.server import bind_socket, build_server, reserved_socket, serve

# A process that serves a stand-in application (no torch: it starts quickly) whose /slow takes half a second.
PROGRAM = textwrap.dedent(
    """
    import asyncio
    from fastapi import FastAPI
    from hqc.serving.server import serve

    app = FastAPI()

    @app.get("/slow")
    async def slow() -> str:
        print("in", flush=True)
        await asyncio.sleep(0.5)
        return "done"

    serve(app, port=0)
    print("returned", flush=True)
    """
)


def test_port_in_use_says_what_to_do() -> None:
    with bind_socket("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=rf"^127\.0\.0\.1:{port}: the port is in use\. .*--port"):
            bind_socket("127.0.0.1", port)
    bind_socket("127.0.0.1", port).close()  # free again


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("127.0.0.1", 65536, "not a port"),
        ("127.0.0.1", -1, "not a port"),
        ("no.such.host.invalid", 8000, "no such host"),
        ("x" * 300, 8000, "no such host"),
        ("192.0.2.1", 0, "cannot listen there"),  # TEST-NET-1: never an address of this computer
    ],
)
def test_addresses_that_cannot_be_had(host: str, port: int, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        bind_socket(host, port)


def test_bound_socket_accepts_at_once() -> None:
    with bind_socket("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname(), timeout=5):
        pass


def test_a_reserved_address_refuses_connections_until_it_is_listened_on() -> None:
    with reserved_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_of_two_that_reserved_an_address_the_second_to_listen_is_refused() -> None:
    app = create_app([Served(FakeBackend(), "digits-test", "fake")])
    with reserved_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        try:
            second = reserved_socket("127.0.0.1", port)
        except ServingError:  # not where a system takes no second one
            return
        first.listen()
        with pytest.raises(ServingError, match=rf"^127\.0\.0\.1:{port}: the port is in use"):
            serve(app, reserved=second)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_signal_lets_the_running_request_finish(number: signal.Signals) -> None:
    root = Path(__file__).parents[2]
    command = [sys.executable, "-W", "error", "-c", PROGRAM]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=root, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            line = process.stdout.readline()
            assert line.startswith("Serving at http://127.0.0.1:"), process.stderr.read()
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            host, port = line.split()[2].removeprefix("http://").split(":")
            assert (host, port.isdigit()) == ("127.0.0.1", True)
            with socket.create_connection((host, int(port)), timeout=30) as connection:
                connection.sendall(b"GET /slow HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
                assert process.stdout.readline() == "in\n"
                process.send_signal(number)
                answer = b"".join(iter(lambda: connection.recv(4096), b""))
            assert answer.startswith(b"HTTP/1.1 200")
            assert json.loads(answer.partition(b"\r\n\r\n")[2]) == "done"
            out, err = process.communicate(timeout=30)
            assert (process.returncode, out, err) == (0, "returned\n", "")
            with pytest.raises(OSError, match="refused"):
                opener.open(f"http://{host}:{port}/", timeout=5)
        finally:
            process.kill()


def test_connections_are_kept_for_longer_than_clients_keep_them() -> None:
    """httpx drops an idle one after 5 s: a server that closes it at that moment fails the request that is under way."""
    app = create_app([Served(FakeBackend(), "digits-test", "fake")])
    kept = httpx.Limits().keepalive_expiry
    assert kept is not None
    assert build_server(app).config.timeout_keep_alive > kept
