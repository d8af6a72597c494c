"""The page at `/` and the reference at `/docs`: files of the package under fixed names, with no script of others."""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files
from pathlib import PurePath

from fastapi import FastAPI, Request, Response

__all__ = ["PAGES", "add_pages"]

FOLDER = "page"
PAGES = {
    "/": "index.html",
    "/docs": "docs.html",
    "/page/icon.svg": "icon.svg",
    "/page/style.css": "style.css",
    "/page/page.js": "page.js",
    "/page/form.js": "form.js",
    "/page/stream.js": "stream.js",
    "/page/results.js": "results.js",
    "/page/difference.js": "difference.js",
    "/page/docs.js": "docs.js",
    "/page/elements.js": "elements.js",
}
"""What there is: path to file. A path of a client is looked up here, and opens nothing."""

_MEDIA_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",  # asked for again each time: a newer server has newer scripts
}


def add_pages(app: FastAPI) -> None:
    """Adds every route of `PAGES`, read now; they are not in the schema."""
    folder = files("hqc.serving") / FOLDER
    for path, name in PAGES.items():
        answer = _answering((folder / name).read_bytes(), f"{_MEDIA_TYPES[PurePath(name).suffix]}; charset=utf-8")
        app.add_api_route(path, answer, methods=["GET", "HEAD"], include_in_schema=False, response_class=Response)


def _answering(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'

    async def answer(request: Request) -> Response:
        headers = {**_HEADERS, "ETag": tag}
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer
