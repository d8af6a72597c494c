"""What can go wrong: for the person who starts the server, and for the one who sends a request."""

from collections.abc import Mapping

from hqc.errors import HqcError

__all__ = ["ApiError", "ServingError"]


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
