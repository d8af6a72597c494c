"""A headless Chromium over the DevTools protocol's pipe: what the tests of the pages and their screenshot need."""

import base64
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Browser", "Tab", "find_chromium", "started"]

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# The browser reads commands from descriptor 3 and writes to 4; Python hands on descriptors under their own numbers.
LAUNCH = "import os, sys; _, a, b, *run = sys.argv; os.dup2(int(a), 3); os.dup2(int(b), 4); os.execv(run[0], run)"
ABOVE = 10  # so that neither is overwritten by the other's copy
KEYS = {"Enter": (13, "\r"), "Tab": (9, ""), "Escape": (27, ""), "ArrowRight": (39, ""), " ": (32, " ")}


def find_chromium() -> str | None:
    """The path of a Chromium that is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextmanager
def started(program: str) -> "Iterator[Browser]":
    """A browser with an empty profile, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as profile:
        browser = Browser(program, Path(profile))
        try:
            yield browser
        finally:
            browser.close()


class Browser:
    """One process of Chromium; commands wait for their answers, events are kept for the tab that they are of."""

    def __init__(self, program: str, profile: Path) -> None:
        import fcntl

        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        handed = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, ABOVE) for each in (theirs_in, theirs_out)]
        command = [program, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", LAUNCH, *map(str, handed), *command],
            pass_fds=handed,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "HOME": str(profile)},
        )
        for each in (theirs_in, theirs_out, *handed):
            os.close(each)
        self._writing = os.fdopen(ours_out, "wb", buffering=0)
        self._reading = os.fdopen(ours_in, "rb", buffering=0)
        self._news = threading.Condition()
        self._answers: dict[int, Any] = {}
        self._last = 0
        self._ended = False
        self.events: list[Any] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def send(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """The result of a command.

        Raises:
            RuntimeError: if the browser refuses it, has ended, or does not answer.
        """
        with self._news:
            self._last += 1
            number = self._last
        message = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._writing.write(json.dumps(message).encode() + b"\0")
        with self._news:
            if not self._news.wait_for(lambda: number in self._answers or self._ended, timeout=60):
                raise RuntimeError(f"chromium does not answer {method}")
            answer = self._answers.pop(number, {"error": "chromium has ended"})
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def open(self, url: str) -> "Tab":
        """A new tab with a page that has loaded."""
        tab = Tab(self)
        tab.open(url)
        return tab

    def close(self) -> None:
        """Ends the process and all of its own."""
        try:
            self.send("Browser.close")
            self._process.wait(10)
        except (RuntimeError, OSError, subprocess.TimeoutExpired):
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(10)
        self._reader.join(10)
        self._writing.close()
        self._reading.close()

    def _read(self) -> None:
        rest = b""
        while chunk := self._reading.read(1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            with self._news:
                for message in map(json.loads, messages):
                    if "id" in message:
                        self._answers[message["id"]] = message
                    else:
                        self.events.append(message)
                self._news.notify_all()
        with self._news:
            self._ended = True
            self._news.notify_all()


class Tab:
    """A page as somebody uses it: with a mouse and a keyboard."""

    def __init__(self, browser: Browser) -> None:
        self._browser = browser
        target = browser.send("Target.createTarget", url="about:blank")["targetId"]
        self._target = target
        self.session = browser.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> Any:
        """A command to this page."""
        return self._browser.send(method, self.session, **parameters)

    def open(self, url: str) -> None:
        """Goes there, and waits until the page has loaded."""
        self.send("Page.navigate", url=url)
        self.wait_for(f"document.readyState === 'complete' && location.href.startsWith({json.dumps(url)})")

    def close(self) -> None:
        """Closes it."""
        self._browser.send("Target.closeTarget", targetId=self._target)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for.

        Raises:
            RuntimeError: if it throws.
        """
        found = self.send("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 30) -> Any:
        """The value of an expression, once it is true.

        Raises:
            RuntimeError: with the page's text, if it never is.
        """
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > deadline:
                raise RuntimeError(f"never true: {expression}\n{self.evaluate('document.body.innerText')}")
            time.sleep(0.02)
        return value

    def text(self, selector: str) -> str:
        """The text of an element, as it is shown."""
        return str(self.evaluate(f"document.querySelector({json.dumps(selector)}).innerText"))

    def click(self, selector: str) -> None:
        """Clicks in the middle of an element."""
        script = """(selector) => {
            const element = document.querySelector(selector);
            element.scrollIntoView({ block: "center" });
            const box = element.getBoundingClientRect();
            return [box.x + box.width / 2, box.y + box.height / 2];
        }"""
        x, y = self.evaluate(f"({script})({json.dumps(selector)})")
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def press(self, key: str, times: int = 1) -> None:
        """Presses a key of `KEYS` in the element that has the focus."""
        code, text = KEYS[key]
        named = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": code}
        for _ in range(times):
            self.send("Input.dispatchKeyEvent", type="keyDown", **named, **({"text": text} if text else {}))
            self.send("Input.dispatchKeyEvent", type="keyUp", **named)

    def write(self, selector: str, text: str) -> None:
        """Replaces what a field holds."""
        self.evaluate(f"document.querySelector({json.dumps(selector)}).select()")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.send("Input.insertText", text=text)

    def resize(self, width: int, height: int, scale: float = 1) -> None:
        """Sets the size of the window in CSS pixels."""
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=False
        )

    def media(self, **features: str) -> None:
        """Sets media features, `prefers_color_scheme="dark"`."""
        named = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
        self.send("Emulation.setEmulatedMedia", features=named)

    def screenshot(self) -> bytes:
        """The window as a PNG."""
        return base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"])

    def events(self, *methods: str) -> list[dict[str, Any]]:
        """What the page has told so far of these kinds."""
        own = [event for event in list(self._browser.events) if event.get("sessionId") == self.session]
        return [event["params"] for event in own if event["method"] in methods]

    def complaints(self) -> list[str]:
        """Errors of the console, uncaught exceptions, and what the browser logs as errors."""
        found = [json.dumps(event) for event in self.events("Runtime.exceptionThrown")]
        found += [json.dumps(event) for event in self.events("Runtime.consoleAPICalled") if event["type"] == "error"]
        entries = [event["entry"] for event in self.events("Log.entryAdded")]
        return found + [f"{entry['text']} {entry.get('url', '')}" for entry in entries if entry["level"] == "error"]
