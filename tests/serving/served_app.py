"""A real HTTP server around a backend, in a thread on a free port of the loopback interface."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from hqc.serving.app import Served, create_app
from hqc.serving.engine import Engine
from hqc.serving.guards import Rules
from hqc.serving.limits import Limits
from hqc.serving.server import bind_socket, build_server

__all__ = ["ServedClient", "served"]


class ServedClient(httpx.Client):
    """A client that can also look into the engine of the server behind it."""

    engine: Engine


@contextmanager
def served(
    backend: Any, limits: Limits, rules: Rules | None = None, beside: Any = None, **options: Any
) -> Iterator[ServedClient]:
    """An HTTP client of a server that runs in a thread on a free port of the loopback interface."""
    models = [Served(backend, "digits-test", "fake")]
    if beside is not None:
        models.append(Served(beside, "beside", "fake"))
    app = create_app(models, limits=limits, rules=rules, **options)
    server = build_server(app, limits)
    listener = bind_socket("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        with ServedClient(base_url=url, timeout=30, trust_env=False) as client:
            client.engine = app.state.engines[0]
            yield client
    finally:
        server.should_exit = True
        thread.join(30)
        listener.close()
        assert not thread.is_alive()
