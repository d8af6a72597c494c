"""The picture of the page at `/` of `hqc serve` in the README: real models, drawn in a headless Chromium."""

import argparse
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chromium import find_chromium, started
from PIL import Image

TARGET = Path(__file__).resolve().parents[1] / "docs" / "images" / "serve.png"
DRAWN = "document.getElementById('status').textContent.startsWith('Drawn')"
COLORS = 128


@contextmanager
def serving(model: str, against: str | None) -> Iterator[str]:
    """The address of an `hqc serve` that ends with the block."""
    beside = [] if against is None else ["--against", against]
    command = [sys.executable, "-m", "hqc.cli", "serve", model, *beside, "--port", "0"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "HQC_PROGRESS": "0"}
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            if not line.startswith("Serving at "):
                raise SystemExit("hqc serve has not started")
            yield line.split()[2]
        finally:
            server.terminate()


def main() -> None:
    """Draws several digits with both models, and saves the window."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="an export or a Program")
    parser.add_argument("--against", help="the float model")
    parser.add_argument("--digits", default="3,8,2,0,4,5")
    parser.add_argument("--seed", type=int, default=1, help="of the first digit; one more for each that follows")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("-o", "--output", type=Path, default=TARGET)
    options = parser.parse_args()
    program = find_chromium()
    if program is None:
        parser.error("no chromium is installed")
    with serving(options.model, options.against) as url, started(program) as browser:
        tab = browser.open(f"{url}/")
        tab.resize(1180, 700)
        tab.send("Emulation.setScrollbarsHidden", hidden=True)
        tab.media(prefers_color_scheme="dark" if options.dark else "light")
        tab.wait_for("!document.getElementById('draw').disabled")
        for index, digit in enumerate(options.digits.split(",")):
            tab.click(f"input[name=tile][value='{digit}']")
            tab.write("#seed", str(options.seed + index))
            tab.evaluate("document.getElementById('status').textContent = ''")
            tab.click("#draw")
            tab.wait_for(DRAWN, seconds=300)
        tab.evaluate("document.activeElement.blur()")
        shot = Image.open(io.BytesIO(tab.screenshot())).convert("RGB")
        assert tab.complaints() == []
    shot.quantize(COLORS, dither=Image.Dither.NONE).save(options.output, optimize=True)
    print(f"wrote {options.output}, {options.output.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
