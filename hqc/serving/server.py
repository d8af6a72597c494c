"""Runs the application with uvicorn until a signal stops it."""

import errno
import math
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING

from hqc.errors import RuntimeMissingError
from hqc.serving.errors import ServingError
from hqc.serving.limits import Limits

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["bind_socket", "build_server", "print_url", "reserved_socket", "serve"]

OWN_ADDRESS = "Use 127.0.0.1, or another address of this computer."
OWN_FILES = 64  # that the process has open besides connections, those that are being closed among them
LINE = 128  # connections that the system holds until they are accepted
# Of one turn of the event loop, which closes one too many three turns later: asyncio's hundreds would be open at once,
# and where a process may open no more, it logs a traceback for each.
ACCEPTED_AT_ONCE = 8
LINGER_S = 2  # for answers that are being written when the engine has ended


def serve(
    app: "FastAPI",
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    limits: Limits | None = None,
    announce: Callable[[str], None] | None = None,
    reserved: socket.socket | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then refuse what waits, give what runs `limits.shutdown_s`, and return.

    Args:
        app: from `hqc.serving.app.create_app`.
        host: address to listen on; the default is reachable from this computer only.
        port: 0 takes a free one.
        limits: of connections and times; a second signal ends at once.
        announce: called with the URL once connections are accepted; printed when None.
        reserved: of `reserved_socket`, instead of host and port; closed at the end.

    Raises:
        RuntimeMissingError: uvicorn is not installed.
        ServingError: the address is in use, not allowed, or not this computer's.
    """
    server = build_server(app, limits)
    listener = reserved or reserved_socket(host, port)
    try:
        _listen(listener)
        with _stopping_quietly(server):
            (announce or print_url)(_url(listener))
            server.run(sockets=[listener])
    finally:
        listener.close()


def build_server(app: "FastAPI", limits: Limits | None = None) -> "uvicorn.Server":
    """A uvicorn server that logs warnings only; `run(sockets=[bind_socket(...)])` starts it.

    Raises:
        RuntimeMissingError: uvicorn is not installed.
    """
    try:
        import uvicorn

        from hqc.serving.protocol import limited_protocol
    except ModuleNotFoundError as error:
        raise RuntimeMissingError(
            "hqc serve", "fastapi/uvicorn are not installed", "pip install 'hqc[serve]'"
        ) from error
    allowed = _affordable(limits or Limits())
    config = uvicorn.Config(
        app,
        http=limited_protocol(allowed),
        backlog=ACCEPTED_AT_ONCE,
        log_level="warning",
        access_log=False,
        ws="none",
        # Not uvicorn's 5 s, after which httpx, and with it OpenAI's client, drops a connection too: one that is sent to
        # just then would be an error.
        timeout_keep_alive=math.ceil(allowed.head_s),
        timeout_graceful_shutdown=round(allowed.shutdown_s + LINGER_S),
    )

    class Server(uvicorn.Server):
        """Tells the engine of a signal at once: what waits is answered, not waited for."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            """Of uvicorn's, which has made the system's line as short as what is accepted at once."""
            await super().startup(sockets)
            for listener in sockets or ():
                listener.listen(LINE)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            """Of uvicorn's: the first signal asks, the second one insists."""
            super().handle_exit(sig, frame)
            _drain(app, 0 if self.force_exit else allowed.shutdown_s)

    return Server(config)


def _drain(app: "FastAPI", grace_s: float) -> None:
    """In a thread: a signal may come while this one holds the engine's lock."""
    for engine in getattr(app.state, "engines", ()):
        threading.Thread(target=engine.drain, args=(grace_s,), daemon=True).start()


def _affordable(limits: Limits) -> Limits:
    """No more connections than the process may have open files."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows
        return limits
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if allowed == resource.RLIM_INFINITY:
        return limits
    return replace(limits, max_connections=max(1, min(limits.max_connections, allowed - OWN_FILES)))


def bind_socket(host: str, port: int) -> socket.socket:
    """A listening TCP socket, so that an address that cannot be had is known before anything else starts.

    Raises:
        ServingError: as `reserved_socket`.
    """
    listener = reserved_socket(host, port)
    _listen(listener)
    return listener


def reserved_socket(host: str, port: int) -> socket.socket:
    """A TCP socket that has its address, and refuses connections until `serve` listens: while a model is read.

    Raises:
        ServingError: the port is in use or needs privileges, or the host is not an address of this computer.
    """
    where = f"{host}:{port}"
    if not 0 <= port <= 65535:
        raise ServingError(where, "not a port, expected 0 to 65535", "Choose another with --port.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ServingError(where, f"no such host ({error})", OWN_ADDRESS) from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _unbindable(where, error) from error
    return listener


def _listen(listener: socket.socket) -> None:
    """Another process that had reserved the address too may be the first to listen."""
    host, port = listener.getsockname()[:2]
    try:
        listener.listen(LINE)
    except OSError as error:
        listener.close()
        raise _unbindable(f"{host}:{port}", error) from error


def _unbindable(where: str, error: OSError) -> ServingError:
    if error.errno == errno.EADDRINUSE:
        return ServingError(where, "the port is in use", "Stop what listens there, or choose another --port.")
    if error.errno == errno.EACCES:
        return ServingError(where, "the port needs privileges", "Choose one from 1024 on with --port.")
    return ServingError(
        where,
        f"cannot listen there ({error.strerror})",
        OWN_ADDRESS,
    )


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def print_url(url: str) -> None:
    """Where it serves, for whoever started it."""
    print(f"Serving at {url} (a page; POST /v1/images/generations, GET /health, /docs). Stop with Ctrl-C.", flush=True)


@contextmanager
def _stopping_quietly(server: "uvicorn.Server") -> Iterator[None]:
    """Signals end the server and nothing else.

    uvicorn raises a signal again after its shutdown, for the handlers that stood before; these only repeat
    the wish to stop, so that `serve` returns. They also catch a signal that comes before uvicorn's own stand.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(_: int, __: FrameType | None) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
