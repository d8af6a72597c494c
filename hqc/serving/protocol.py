"""uvicorn's HTTP/1.1 connection with limits: how many there are, and how long a request may take to arrive."""

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hqc.serving.limits import Limits

__all__ = ["limited_protocol"]


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=…)`.

    A connection beyond `max_connections` is closed, and so is one whose next request's head has not arrived after
    `head_s`: clients that send nothing, or a byte a minute, hold neither a descriptor nor a line of the log.
    """

    class LimitedProtocol(H11Protocol):
        _head_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """See asyncio.Protocol."""
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self.connections.discard(self)
                transport.abort()
                return
            self._wait_for_head()

        def connection_lost(self, exc: Exception | None) -> None:
            """See asyncio.Protocol."""
            self._head_is_here()
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """See asyncio.Protocol."""
            super().data_received(data)
            if self.conn.their_state is not h11.IDLE:
                self._head_is_here()

        def on_response_complete(self) -> None:
            """Of uvicorn's: the next request may come now."""
            super().on_response_complete()
            if not self.transport.is_closing():
                self._wait_for_head()

        def send_400_response(self, msg: str) -> None:
            """Of uvicorn's, which answers what is no HTTP: not in the middle of another answer."""
            if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE) and not self._answering():
                super().send_400_response(msg)
            else:
                self.transport.close()
            if self.cycle is not None:  # whoever reads the body is told that there will be no more of it
                self.cycle.disconnected = True
                self.cycle.message_event.set()

        def _answering(self) -> bool:
            return self.cycle is not None and self.cycle.response_started and not self.cycle.response_complete

        def _wait_for_head(self) -> None:
            self._head_is_here()
            self._head_timer = self.loop.call_later(limits.head_s, self._too_slow)

        def _head_is_here(self) -> None:
            if self._head_timer is not None:
                self._head_timer.cancel()
                self._head_timer = None

        def _too_slow(self) -> None:
            if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
                self.transport.abort()

    return LimitedProtocol
