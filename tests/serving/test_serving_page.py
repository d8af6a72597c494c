"""The page at / and the reference at /docs as files: headers, names, and nothing from elsewhere."""

import re
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pathspec
import pytest
from fake_backend import FakeBackend

from hqc.serving.pages import PAGES

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "hqc" / "serving" / "page"
FILES = sorted(FOLDER.iterdir())
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self' data: blob:",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
}


@pytest.fixture
def client(start: Any) -> httpx.Client:
    return start(backend=FakeBackend())


@pytest.mark.parametrize("path", PAGES)
def test_what_is_served_is_the_file_with_strict_headers(client: httpx.Client, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code == 200
    assert answer.content == (FOLDER / PAGES[path]).read_bytes()
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert answer.headers["content-type"] == f"{kinds[PAGES[path].rpartition('.')[2]]}; charset=utf-8"
    directives = [
        directive.strip().partition(" ") for directive in answer.headers["content-security-policy"].split(";")
    ]
    assert {name: value for name, _, value in directives} == POLICY
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-cache"
    head = client.head(path)
    assert (head.status_code, head.content) == (200, b"")
    again = client.get(path, headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", answer.headers["etag"])
    assert client.get(path, headers={"If-None-Match": '"another"'}).status_code == 200


@pytest.mark.parametrize(
    "path",
    [
        "/page", "/page/", "/page/index.html", "/page/nothing.js", "/page/..%2fpages.py", "/page/%2e%2e/app.py",
        "/page/page.js%00", "/index.html", "/redoc", "/docs/oauth2-redirect", "/page/../../serving/app.py",
    ],
)  # fmt: skip
def test_other_names_are_not_found(client: httpx.Client, path: str) -> None:
    url = client.base_url.copy_with(raw_path=path.encode())
    answer = client.get(url)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "not_found"


def test_pages_are_answered_to_the_names_of_the_server_alone(client: httpx.Client) -> None:
    assert client.get("/", headers={"Host": "elsewhere.example"}).status_code == 421


def test_pages_are_not_in_the_schema(client: httpx.Client) -> None:
    assert not set(client.get("/openapi.json").json()["paths"]) & set(PAGES)


def test_every_file_is_served_and_in_the_wheel() -> None:
    """The wheel has all of the package that git does not ignore."""
    assert {path.name for path in FILES} == set(PAGES.values())
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel == {"packages": ["hqc"]}
    ignored = pathspec.GitIgnoreSpec.from_lines((ROOT / ".gitignore").read_text("utf-8").splitlines())
    assert not list(ignored.match_files(path.relative_to(ROOT).as_posix() for path in FILES))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_nothing_comes_from_elsewhere_and_nothing_is_inline(path: Path) -> None:
    text = path.read_text("utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert re.findall(r"https?:|wss?:|\burl\(|@import|[\"'`(]//", text) == []
    assert not re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|Function\(", text)
    if path.suffix == ".html":
        assert not re.findall(r"<style|\sstyle=|\son\w+=|javascript:", text)
        assert all(re.search(r"\ssrc=", tag) for tag in re.findall(r"<script[^>]*>", text))
        for link in re.findall(r"(?:src|href)=\"([^\"]*)\"", text):
            assert f"/{link.removeprefix('./')}" in {*PAGES, "/openapi.json"}
    for module in re.findall(r"from \"\./([^\"]+)\"", text):
        assert (FOLDER / module).is_file()
