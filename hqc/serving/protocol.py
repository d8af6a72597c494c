"""uvicorn's HTTP/1.1 connection with limits: how many there are, and how long a request may take to arrive."""

import asyncio
from typing import Literal

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hqc.serving.limits import Limits

__all__ = ["UNREAD_BYTES", "limited_protocol"]


UNREAD_BYTES = 2**24  # of a body after its answer: most clients read the answer once they have sent all of it

Wait = Literal["head", "unread body"]


def limited_protocol(limits: Limits) -> type[H11Protocol]:
    """A protocol class for `uvicorn.Config(http=…)`.

    A connection beyond `max_connections` is closed, and so is one whose next request's head has not arrived after
    `head_s`: clients that send nothing, or a byte a minute, hold neither a descriptor nor a line of the log. A body
    that nobody reads, since its request has been answered, has `body_s` and `UNREAD_BYTES` to end.
    """

    class LimitedProtocol(H11Protocol):
        _waits_for: Wait | None = None
        _timer: asyncio.TimerHandle | None = None
        _unread = 0

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            """See asyncio.Protocol."""
            super().connection_made(transport)
            if len(self.connections) > limits.max_connections:
                self.connections.discard(self)
                transport.abort()
                return
            self._follow()

        def connection_lost(self, exc: Exception | None) -> None:
            """See asyncio.Protocol."""
            self._wait_for(None)
            super().connection_lost(exc)

        def data_received(self, data: bytes) -> None:
            """See asyncio.Protocol."""
            super().data_received(data)
            self._follow()
            if self._waits_for == "unread body":
                self._unread += len(data)
                if self._unread > UNREAD_BYTES:
                    self.transport.abort()

        def on_response_complete(self) -> None:
            """Of uvicorn's: the next request may come now."""
            super().on_response_complete()
            self._follow()

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

        def _follow(self) -> None:
            """Starts the time of what is waited for now, unless it runs already."""
            now = self._awaited()
            if now != self._waits_for:
                self._wait_for(now)

        def _awaited(self) -> Wait | None:
            if self.transport.is_closing():
                return None
            if self.conn.their_state is h11.IDLE:
                return "head"
            return "unread body" if self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE else None

        def _wait_for(self, what: Wait | None) -> None:
            if self._timer is not None:
                self._timer.cancel()
            self._waits_for, self._timer, self._unread = what, None, 0
            if what is not None:
                seconds = limits.head_s if what == "head" else limits.body_s
                self._timer = self.loop.call_later(seconds, self.transport.abort)

    return LimitedProtocol
