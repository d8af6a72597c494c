"""Who may ask, an id for every request, and an answer where it fails. Plain ASGI."""

import hmac
import json
import logging
import re
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hqc.serving.errors import ApiError
from hqc.serving.schemas import ErrorBody, ErrorResponse

__all__ = ["LOOPBACK", "NEVER_AGAIN", "Guards", "RequestIds", "Rules", "error_body"]

logger = logging.getLogger(__name__)

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
NEVER_AGAIN = {"x-should-retry": "false"}  # the newest client would ask twice more
ANY = "*"
_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_KINDS = {401: "authentication_error", 429: "rate_limit_error", 500: "server_error", 503: "server_error"}


@dataclass(frozen=True)
class Rules:
    """What is asked of every request.

    hosts: names that the `Host` header may have; a page that rebinds its own name to this address has another. `*`
    allows all. api_key: what `Authorization: Bearer …` must be for everything under /v1; None asks for none.
    """

    hosts: tuple[str, ...] = LOOPBACK
    api_key: str | None = None


def error_body(error: ApiError) -> dict[str, Any]:
    """OpenAI's shape of an error."""
    kind = _KINDS.get(error.status, "server_error" if error.status > 500 else "invalid_request_error")
    body = ErrorBody(message=error.message, type=kind, param=error.param, code=error.code)
    return ErrorResponse(error=body).model_dump()


class RequestIds:
    """ASGI middleware: gives every answer an `x-request-id`, the client's own where that is plain."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        own = _headers(scope).get(b"x-request-id", "")
        request_id = own if _ID.fullmatch(own) else f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id

        async def send_with_id(message: Any) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        await self.app(scope, receive, send_with_id)


class Guards:
    """ASGI middleware: refuses what `Rules` do not allow, and answers 500 where the application fails.

    Starlette's own 500 comes from outside of all middleware: with neither an id nor leave for a page of another origin.
    """

    def __init__(self, app: Any, rules: Rules) -> None:
        self.app, self.rules = app, rules
        self._hosts = frozenset(host.lower() for host in rules.hosts)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refusal := self._refusal(scope, _headers(scope))) is not None:
            await _answer(refusal, send)
            return
        started = False

        async def send_and_see(message: Any) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self.app(scope, receive, send_and_see)
        except Exception:
            # It goes on to uvicorn, which logs it and closes the connection: a client that was not told would send its
            # next request into a connection that is being reset.
            if not started:
                logger.error("answered 500 to request %s", scope.get("state", {}).get("request_id"))
                message = "internal error; the server's log has it"
                await _answer(ApiError(500, message, code="internal_error", headers=NEVER_AGAIN), send)
            raise

    def _refusal(self, scope: Any, headers: dict[bytes, str]) -> ApiError | None:
        host = _without_port(headers.get(b"host", ""))
        if ANY not in self._hosts and host not in self._hosts:
            known = ", ".join(self.rules.hosts)
            message = f"this server is called {known}, not {host[:64]!r}; start it with --allowed-host to allow that"
            return ApiError(421, message, code="host_not_allowed")
        if self.rules.api_key is None or not scope["path"].startswith("/v1/") or scope["method"] == "OPTIONS":
            return None
        kind, _, key = headers.get(b"authorization", "").partition(" ")
        if kind.lower() == "bearer" and _equal(key.strip(), self.rules.api_key):
            return None
        message = "no such API key; send the server's in the header Authorization: Bearer …"
        return ApiError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


def _headers(scope: Any) -> dict[bytes, str]:
    """The first of every name."""
    return {name: value.decode("latin-1") for name, value in reversed(scope["headers"])}


def _equal(given: str, key: str) -> bool:
    """In a time that does not depend on where they differ."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), key.encode())


def _without_port(host: str) -> str:
    """The name of a Host header, in small letters: `localhost:8000`, `[::1]:8000`, `localhost.`"""
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0].rstrip(".")


async def _answer(error: ApiError, send: Any) -> None:
    body = json.dumps(error_body(error)).encode()
    headers: Sequence[tuple[bytes, bytes]] = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
        *((name.lower().encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
