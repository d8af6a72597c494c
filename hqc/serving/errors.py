"""What can go wrong: for the person who starts the server, and for the one who sends a request."""

from collections.abc import Mapping

from hqc.errors import HqcError

__all__ = ["ApiError", "Busy", "Cancelled", "ServingError", "Stopped", "TimeUp"]


class ServingError(HqcError):
    """The server cannot start as asked: limits that make no sense, an address that it cannot have."""


class ApiError(Exception):
    """A refused request; becomes `{"error": {"message", "type", "param", "code"}}`.

    Args:
        status: HTTP status.
        message: what was found, and what was expected.
        param: the request's field at fault; None where it is no single field.
        code: a stable word for programs.
        headers: sent with the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})
        super().__init__(message)


class Busy(Exception):
    """Too many requests wait already.

    Args:
        waiting: how many. retry_s: when it is worth trying again, about.
    """

    def __init__(self, waiting: int, retry_s: int) -> None:
        self.waiting, self.retry_s = waiting, retry_s
        super().__init__(f"{waiting} requests are waiting already; try again in {retry_s} s")


class Stopped(Exception):
    """The server is shutting down."""


class TimeUp(Exception):
    """A request has taken longer than it may."""


class Cancelled(Exception):
    """The one who asked has left."""
