"""How long a server takes to start and how much memory it holds: `hqc serve MODEL` for every model that is named.

    python scripts/measure_server_start.py student-pipeline student.hqc digits

A line of JSON a model and repeat: seconds from the command to the first /ready that is answered, seconds of CPU until
then, resident megabytes then and after three images, whether torch's library is mapped. Linux alone: it reads /proc.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any

IMAGES = 3


def measure(model: str, request: dict[str, Any]) -> dict[str, Any]:
    """Starts a server, asks it for images, and ends it."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "hqc.cli", "serve", model, "--port", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = next((word for word in server.stdout.readline().split() if word.startswith("http")), None)
        if url is None:
            raise SystemExit(f"{model}: the server did not start")
        _wait(f"{url}/ready")
        found: dict[str, Any] = {"model": model, "start_s": round(time.perf_counter() - start, 2)}
        found |= {"start_cpu_s": _cpu_seconds(server.pid), "start_mb": _resident(server.pid)}
        for _ in range(IMAGES):
            _ask(url, request)
        maps = Path(f"/proc/{server.pid}/maps").read_text(encoding="utf-8")
        return {**found, "after_mb": _resident(server.pid), "torch": "libtorch" in maps}
    finally:
        server.terminate()
        server.wait()


def _wait(url: str) -> None:
    while True:
        with suppress(OSError), urllib.request.urlopen(url, timeout=10):
            return
        time.sleep(0.02)


def _ask(url: str, body: dict[str, Any]) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/images/generations", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as answer:
        answer.read()


def _resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") // 10**6


def _cpu_seconds(process: int) -> float:
    """Of all its threads, in user and in kernel mode."""
    after_name = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return sum(map(int, after_name[11:13])) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Parses, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--request", type=json.loads, default={"class_label": 3, "seed": 1}, help="JSON")
    given = parser.parse_args()
    for _ in range(given.repeats):
        for model in given.models:
            print(json.dumps(measure(model, given.request)), flush=True)


if __name__ == "__main__":
    main()
