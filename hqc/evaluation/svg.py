"""SVG and HTML as text: elements whose attributes and texts are always escaped, scales, and axis ticks."""

import html
import math
import re
from collections.abc import Callable, Sequence

__all__ = ["Axis", "element", "escape", "linear_axis", "log_axis", "number"]

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def escape(text: object) -> str:
    """Text that is safe in an element or a quoted attribute; characters that XML does not have become �."""
    return html.escape(_NOT_XML.sub("\ufffd", str(text)), quote=True)


def number(value: float) -> str:
    """A coordinate: two decimals, no trailing zeros, the same on every machine."""
    return f"{value:.2f}".rstrip("0").rstrip(".") if value else "0"


def element(name: str, *children: str, **attributes: object) -> str:
    """`<name a="…">children</name>`; children are markup, attributes are escaped here.

    `class_` is class; an underscore is a hyphen; numbers are coordinates; None leaves the attribute out.

    >>> element("rect", x=1.5, class_="a", stroke_width=2)
    '<rect x="1.5" class="a" stroke-width="2"/>'
    """
    parts = [name]
    for key, value in attributes.items():
        if value is not None:
            shown = number(value) if isinstance(value, int | float) else escape(value)
            parts.append(f'{key.rstrip("_").replace("_", "-")}="{shown}"')
    inner = "".join(children)
    opening = " ".join(parts)
    return f"<{opening}>{inner}</{name}>" if inner else f"<{opening}/>"


class Axis:
    """A mapping from values to pixels, with its ticks."""

    def __init__(self, place: Callable[[float], float], ticks: Sequence[float]) -> None:
        self.place, self.ticks = place, tuple(ticks)

    def __call__(self, value: float) -> float:
        """The pixel of a value."""
        return self.place(value)


def linear_axis(values: Sequence[float], start: float, end: float, *, zero: bool = False) -> Axis:
    """Covers the values with round ticks; with `zero` from zero on."""
    low, high = _span([*values, 0.0] if zero else values)
    step = _step(high - low)
    first, last = math.floor(low / step), math.ceil(high / step)
    low, high = first * step, max(last, first + 1) * step
    ticks = [round(i * step, 12) for i in range(first, max(last, first + 1) + 1)]
    return Axis(lambda v: start + (end - start) * (v - low) / (high - low), ticks)


def log_axis(values: Sequence[float], start: float, end: float) -> Axis:
    """Covers positive values; ticks at 1, 2, 5 times the powers of ten."""
    low, high = _span([v for v in values if v > 0])
    decades = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 2)
    steps = [m * 10.0**d for d in decades for m in (1, 2, 5)]
    bottom = max(s for s in steps if s <= low * (1 + 1e-9))
    top = min(s for s in steps if s >= high * (1 - 1e-9) and s > bottom)
    ticks = [s for s in steps if bottom <= s <= top]
    if len(ticks) > 8:
        ticks = [s for s in ticks if math.isclose(math.log10(s), round(math.log10(s)), abs_tol=1e-9)]
    width = math.log(top / bottom)
    return Axis(lambda v: start + (end - start) * math.log(max(v, bottom) / bottom) / width, ticks)


def _span(values: Sequence[float]) -> tuple[float, float]:
    finite = [v for v in values if math.isfinite(v)] or [1.0]
    low, high = min(finite), max(finite)
    return (low, high) if high - low > 1e-6 * abs(high) else (low, low + (0.1 * abs(low) or 1.0))


def _step(width: float) -> float:
    """A round step that divides the width into four to ten parts."""
    rough = max(width, 1e-12) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= rough * (1 - 1e-9))
