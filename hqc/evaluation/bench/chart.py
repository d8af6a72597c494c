"""The figures as a picture: bars of milliseconds with their spread and ratio, of bytes on disk and in memory.

One list of shapes, drawn twice: as SVG text, and by Pillow as a PNG of twice the size.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from xml.sax.saxutils import escape

from PIL import Image, ImageDraw, ImageFont

from hqc.errors import EvaluationError
from hqc.evaluation.bench.machine import machine_line
from hqc.evaluation.bench.result import BenchResult, spread
from hqc.evaluation.images import png_from_pil, write_atomic
from hqc.storage import refuse_existing_file

__all__ = ["check_chart", "png_chart", "save_chart", "svg_chart"]

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MARGIN, ROW, BAR, GAP = 24, 46, 22, 28  # px
TITLE, TEXT, NOTE = 18, 13, 11  # px
SCALE = 2  # of the PNG
PAPER, INK, FAINT, OURS, PEER = "#fafaf8", "#1c1c1e", "#6e6e73", "#2a6f97", "#b8bec6"
SLACK = 1.12  # a browser's sans-serif may be wider than the font that texts are measured with


@dataclass(frozen=True)
class _Box:
    x: float
    y: float
    width: float
    height: float
    fill: str


@dataclass(frozen=True)
class _Label:
    x: float
    y: float  # middle of the line
    text: str
    size: int
    fill: str = INK


_Shape = _Box | _Label


@dataclass(frozen=True)
class _Value:
    """One bar: its length, its text, and the spread that is drawn over it."""

    value: float
    text: str
    low: float | None = None
    high: float | None = None

    @property
    def end(self) -> float:
        return max(self.value, self.high or 0.0)


@dataclass(frozen=True)
class _Panel:
    """A column of bars on one scale, `bar_width` px for the longest."""

    title: str
    bar_width: int
    values: tuple[_Value, ...]

    @property
    def width(self) -> float:
        return max(self.bar_width + 8 + max(_width(v.text, TEXT) for v in self.values), _width(self.title, TEXT))


def check_chart(path: Path, *, force: bool) -> None:
    """Refuses another suffix than .png or .svg, and a file that is there, before long work starts.

    Raises:
        EvaluationError: for the suffix. ArtefactError: for the file.
    """
    if path.suffix.lower() not in (".png", ".svg"):
        raise EvaluationError(f"--chart {path}", "is neither .png nor .svg", "Give one of them.")
    refuse_existing_file(path, force=force)


def save_chart(path: Path, result: BenchResult) -> None:
    """Writes the chart whole or not at all, in the format that the suffix names.

    Raises:
        ArtefactError: the file cannot be written.
    """
    data = svg_chart(result).encode() if path.suffix.lower() == ".svg" else png_from_pil(png_chart(result))
    write_atomic(path, data)


def svg_chart(result: BenchResult) -> str:
    """The chart as an SVG document."""
    shapes, width, height = _layout(result)
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="Helvetica, Arial, sans-serif" role="img">',
        f"<title>{escape(_title(result))}</title>",
        f'<rect width="{width:g}" height="{height:g}" fill="{PAPER}"/>',
        *map(_svg, shapes),
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def png_chart(result: BenchResult) -> Image.Image:
    """The chart as an image."""
    shapes, width, height = _layout(result)
    page = Image.new("RGB", (round(width * SCALE), round(height * SCALE)), PAPER)
    draw = ImageDraw.Draw(page)
    for shape in shapes:
        if isinstance(shape, _Box):
            right, bottom = shape.x + shape.width, shape.y + shape.height
            corners = [round(SCALE * v) for v in (shape.x, shape.y, right, bottom)]
            draw.rectangle((corners[0], corners[1], corners[2] - 1, corners[3] - 1), fill=shape.fill)
        else:
            at = (SCALE * shape.x, SCALE * shape.y)
            draw.text(at, shape.text, font=_font(SCALE * shape.size), fill=shape.fill, anchor="lm")
    return page


def _svg(shape: _Shape) -> str:
    if isinstance(shape, _Box):
        return (
            f'<rect x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}" '
            f'fill="{shape.fill}"/>'
        )
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" fill="{shape.fill}" '
        f'dominant-baseline="central">{escape(shape.text)}</text>'
    )


# ---- layout --------------------------------------------------------------------------------------------------------


def _layout(result: BenchResult) -> tuple[list[_Shape], float, float]:
    """Shapes, width and height."""
    names = [f"hqc {result.quantisation}", *result.peers]
    label_width = max(_width(name, TEXT) for name in [*names, *result.failed])
    panels = _panels(result)
    width = 2 * MARGIN + label_width + sum(GAP + panel.width for panel in panels)
    shapes: list[_Shape] = []
    y = float(MARGIN)
    for text, size, fill in ((_title(result), TITLE, INK), (_protocol(result), NOTE, FAINT)):
        for line in _wrapped(text, size, width - 2 * MARGIN):
            shapes.append(_Label(MARGIN, y + size / 2, line, size, fill))
            y += 1.4 * size
    y += 14
    x = MARGIN + label_width + GAP
    for panel in panels:
        shapes.append(_Label(x, y + TEXT / 2, panel.title, TEXT, FAINT))
        shapes += _bars(panel, x, y + 1.8 * TEXT)
        x += panel.width + GAP
    y += 1.8 * TEXT
    for name in names:
        shapes.append(_Label(MARGIN, y + BAR / 2, name, TEXT, INK))
        y += ROW - 8
    for name, reason in result.failed.items():
        shapes.append(_Label(MARGIN, y + BAR / 2, name, TEXT, INK))
        room = width - 2 * MARGIN - label_width - GAP
        for line in _wrapped(f"failed: {_ascii(reason)}", NOTE, room):
            shapes.append(_Label(MARGIN + label_width + GAP, y + BAR / 2, line, NOTE, FAINT))
            y += 1.4 * NOTE
        y += ROW - 8 - 1.4 * NOTE
    y += 6
    for line in _wrapped(_ascii(machine_line(dict(result.machine))), NOTE, width - 2 * MARGIN):
        shapes.append(_Label(MARGIN, y + NOTE / 2, line, NOTE, FAINT))
        y += 1.4 * NOTE
    return shapes, width, y + MARGIN - 8


def _panels(result: BenchResult) -> tuple[_Panel, ...]:
    times = []
    for name, figures in result.contenders.items():
        found = spread(figures.milliseconds)
        ratio = f"  ({result.speedup(name).median:.2f}x)" if name in result.peers else ""
        times.append(_Value(found.median, f"{_number(found.median)}{ratio}", found.p10, found.p90))
    everyone = result.contenders.values()
    disk = tuple(_Value(f.size_bytes, _number(f.size_bytes / 1e6)) for f in everyone)
    memory = tuple(_Value(f.memory_bytes, _number(f.memory_bytes / 1e6)) for f in everyone)
    return (
        _Panel("ms a call, p10 to p90 (x hqc's time)", 300, tuple(times)),
        _Panel("files, MB", 110, disk),
        _Panel("memory, MB", 110, memory),
    )


def _bars(panel: _Panel, x: float, y: float) -> list[_Shape]:
    shapes: list[_Shape] = []
    scale = panel.bar_width / max(max(value.end for value in panel.values), 1e-9)
    for i, value in enumerate(panel.values):
        top = y + i * (ROW - 8)
        shapes.append(_Box(x, top, max(value.value * scale, 1), BAR, PEER if i else OURS))
        if value.low is not None and value.high is not None:
            low, high, middle = x + value.low * scale, x + value.high * scale, top + BAR / 2
            shapes.append(_Box(low, middle - 0.75, max(high - low, 1.5), 1.5, INK))
            shapes += [_Box(end - 0.75, middle - 5, 1.5, 10, INK) for end in (low, high)]
        shapes.append(_Label(x + value.end * scale + 8, top + BAR / 2, value.text, TEXT))
    return shapes


def _title(result: BenchResult) -> str:
    return _ascii(f"{result.model}, {result.quantisation}")


def _protocol(result: BenchResult) -> str:
    protocol = result.protocol
    return (
        f"batch {protocol['batch_size']}, {protocol['threads']} threads, median of {protocol['runs']} rounds, one run "
        f"of each in turn; memory: {result.memory_note}"
    )


def _number(value: float) -> str:
    """Three digits, or all of the integer part."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _ascii(text: str) -> str:
    """Pillow's built-in font has no more."""
    plain = text.replace("…", "...").replace("–", "-").replace("×", "x").replace("≥", ">=")
    return plain.encode("ascii", "replace").decode("ascii")


def _wrapped(text: str, size: int, width: float) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _width(joined, size) <= width:
            lines[-1] = joined
        else:
            lines.append(word)
    return lines


def _width(text: str, size: int) -> float:
    return SLACK * _font(size).getlength(text)


@cache
def _font(size: int) -> Font:
    return ImageFont.load_default(size=size)
