"""The plots of an analysis as inline SVG: paired dots, a heatmap, bars, and a map of bits. Rows are in data-flow order.

Colours are classes that the page defines for light and for dark; every mark has a tooltip with the site's whole name.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from statistics import median

from hqc.evaluation.analysis import SiteAnalysis
from hqc.evaluation.analysis_report import NUMBERS, Report
from hqc.evaluation.svg import Axis, element, escape, linear_axis, log_axis

__all__ = [
    "HEAT_STEPS",
    "MOST_BARS",
    "bits_map",
    "block_of",
    "heat_limit",
    "outlier_plot",
    "scale_heatmap",
    "sensitivity_bars",
]

WIDTH, LABEL, TOP = 1140.0, 388.0, 34.0
LONGEST_LABEL = 62
HEAT_STEPS = 5
"""Colours on each side of the middle one."""
MOST_BARS = 30
"""Sites in the sensitivity ranking."""


def row_height(count: int) -> float:
    """Smaller rows for large models, still readable."""
    return 14.0 if count <= 120 else 11.0


def block_of(site: str) -> str:
    """The part of the model that a site belongs to: down_blocks.1, mid_block, conv_in."""
    parts = site.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]


def svg(width: float, height: float, *children: str, label: str) -> str:
    """An SVG that scales down with the page."""
    box, style = f"0 0 {width:g} {height:g}", f"width:100%;max-width:{width:g}px"
    return element("svg", *children, viewBox=box, style=style, role="img", aria_label=label)


def title(*lines: str) -> str:
    """A tooltip."""
    return element("title", escape("\n".join(lines)))


def _text(x: float, y: float, text: str, css: str = "", anchor: str | None = None) -> str:
    return element("text", escape(text), x=x, y=y, class_=css or None, text_anchor=anchor)


def _name(x: float, y: float, whole: str, shown: str) -> str:
    return element("text", title(whole), escape(shown), x=x, y=y, class_="site", text_anchor="end")


def shortened(site: str) -> str:
    """The end of a long name, which tells sites apart."""
    return site if len(site) <= LONGEST_LABEL else f"…{site[-LONGEST_LABEL + 1 :]}"


def _labels(sites: Sequence[str], height: float) -> str:
    """Site names at the left, and a band behind every other block of the model."""
    marks, top = [], 0
    for number, (_, group) in enumerate(groupby(sites, key=block_of)):
        count = len(list(group))
        if number % 2:
            marks.append(element("rect", x=0, y=TOP + top * height, width=WIDTH, height=count * height, class_="band"))
        top += count
    for row, site in enumerate(sites):
        y = TOP + (row + 0.5) * height + 3.5
        marks.append(_name(LABEL - 8, y, site, shortened(site)))
    return "".join(marks)


def _grid(axis: Axis, bottom: float, name: str, middle: float, unit: Callable[[float], str] = "{:g}".format) -> str:
    marks = [_text(middle, 11, name, "axis", "middle")]
    for tick in axis.ticks:
        x = axis(tick)
        marks.append(element("line", x1=x, x2=x, y1=TOP - 4, y2=bottom, class_="grid"))
        marks.append(_text(x, TOP - 8, unit(tick), "tick", "middle"))
    return "".join(marks)


def _shown(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}g}"


# ---- outliers ------------------------------------------------------------------------------------------------------


def outlier_plot(sites: Sequence[SiteAnalysis]) -> str:
    """Two panels on the same rows, max/RMS and SNR, each before and after rotation as a pair of dots."""
    height = row_height(len(sites))
    bottom = TOP + len(sites) * height
    middle = LABEL + (WIDTH - LABEL) / 2
    panels = [
        ("max/RMS (log scale; left is better)", "max_over_rms", (LABEL + 12, middle - 20), log_axis),
        ("activation SNR, dB (right is better)", "snr_db", (middle + 20, WIDTH - 16), linear_axis),
    ]
    marks = [_labels([site.plan.site for site in sites], height)]
    for name, key, (start, end), kind in panels:
        pairs = [tuple(site.median(number) for number in NUMBERS[key]) for site in sites]
        axis = kind([v for pair in pairs for v in pair if v is not None], start, end)
        marks.append(_grid(axis, bottom, name, (start + end) / 2))
        both = enumerate(zip(sites, pairs, strict=True))
        marks += [_pair(axis, site, pair, row, height) for row, (site, pair) in both]
    return svg(WIDTH, bottom + 6, *marks, label="Outliers and SNR per site before and after rotation")


def _pair(axis: Axis, site: SiteAnalysis, pair: Sequence[float | None], row: int, height: float) -> str:
    y, (before, after) = TOP + (row + 0.5) * height, pair
    marks = []
    if before is not None and after is not None:
        marks.append(element("line", x1=axis(before), x2=axis(after), y1=y, y2=y, class_="join"))
    if before is not None:
        marks.append(element("circle", cx=axis(before), cy=y, r=3.4, class_="before"))
    if after is not None:
        marks.append(element("circle", cx=axis(after), cy=y, r=3.4, class_="after" if site.plan.block else "could"))
    rotation = f"H{site.block}{'' if site.plan.block else ', not in the plan'}" if site.block else "no rotation fits"
    tip = title(site.plan.site, f"before {_shown(before)}, after {_shown(after)} ({rotation})")
    return element("g", tip, *marks)


# ---- scales over timesteps -----------------------------------------------------------------------------------------


def scales_of(site: SiteAnalysis) -> dict[float, float]:
    """Scale by timestep: the program's own, else the best one in the basis of the plan."""
    found = {}
    for row in site.rows:
        basis = row.rotated if site.plan.block and row.rotated is not None else row.plain
        found[row.timestep] = basis.scale if row.program_scale is None else row.program_scale
    return found


def _ratios(site: SiteAnalysis) -> dict[float, tuple[float, float]]:
    """Timestep -> (scale, log₂ of it over the site's median)."""
    scales = scales_of(site)
    middle = median(scales.values()) if scales else 1.0
    return {t: (s, math.log2(s / middle)) for t, s in scales.items()}


def heat_limit(sites: Sequence[SiteAnalysis]) -> float:
    """Where the colours end: the 95th percentile of |log₂ ratio|, at least half a doubling."""
    found = sorted(abs(ratio) for site in sites for _, ratio in _ratios(site).values())
    return max(0.5, found[int(0.95 * (len(found) - 1))]) if found else 0.5


def scale_heatmap(sites: Sequence[SiteAnalysis]) -> str:
    """Site × timestep, noise at the left: each cell is log₂(scale/the site's median scale)."""
    height, limit = row_height(len(sites)), heat_limit(sites)
    times = sorted({row.timestep for site in sites for row in site.rows}, reverse=True)
    width = (WIDTH - LABEL - 6) / max(1, len(times))
    columns = {t: LABEL + i * width for i, t in enumerate(times)}
    bottom = TOP + len(sites) * height
    marks = [_labels([site.plan.site for site in sites], height)]
    every = max(1, math.ceil(34 / width))
    for i, t in enumerate(times):
        if i % every == 0:
            marks.append(_text(columns[t] + width / 2, TOP - 8, f"{t:g}", "tick", "middle"))
    marks.append(_text(LABEL + (WIDTH - LABEL) / 2, 11, "timestep, from noise to image", "axis", "middle"))
    for row, site in enumerate(sites):
        y = TOP + row * height
        cells = [_cell(columns[t], y, width, height, t, *found, limit) for t, found in sorted(_ratios(site).items())]
        marks.append(element("g", title(site.plan.site), *cells))
    return svg(WIDTH, bottom + 6, *marks, label="Activation scale of every site over timesteps")


def _cell(x: float, y: float, width: float, height: float, t: float, scale: float, ratio: float, limit: float) -> str:
    step = round(max(-1.0, min(1.0, ratio / limit)) * HEAT_STEPS)
    tip = title(f"t={t:g}: scale {scale:.4g}, {2**ratio:.2f} × median")
    return element("rect", tip, x=x, y=y + 0.5, width=width - 0.5, height=height - 1, class_=f"h{step + HEAT_STEPS}")


# ---- sensitivity ---------------------------------------------------------------------------------------------------


def sensitivity_bars(report: Report) -> str:
    """The most sensitive sites, one bar each, in percent of the output's norm."""
    ranking = report.ranking()[:MOST_BARS]
    height = 18.0
    bottom = TOP + len(ranking) * height
    axis = linear_axis([100 * s.error for s in ranking], LABEL, WIDTH - 90, zero=True)
    marks = [_grid(axis, bottom, "relative output error with only this site quantised, %", (LABEL + WIDTH) / 2)]
    bits = {site.plan.site: site.bits for site in report.sites}
    for row, found in enumerate(ranking):
        y, value = TOP + row * height, 100 * found.error
        tip = title(found.site, f"{value:.3g} %", *(f"t={t:g}: {100 * e:.3g} %" for t, e in found.by_timestep))
        bar = element("rect", x=LABEL, y=y + 3, width=max(0.5, axis(value) - LABEL), height=height - 6, class_="bar")
        name = _text(LABEL - 8, y + height / 2 + 3.5, shortened(found.site), "site", "end")
        amount = _text(axis(value) + 6, y + height / 2 + 3.5, f"{value:.3g} %  {bits[found.site]}", "tick")
        marks.append(element("g", tip, bar, name, amount))
    return svg(WIDTH, bottom + 6, *marks, label="Sites by sensitivity")


# ---- bits ----------------------------------------------------------------------------------------------------------

TILE = 17.0


def bits_map(sites: Sequence[SiteAnalysis], colours: Mapping[str, str]) -> str:
    """One tile a site, a line a block of the model: colour is the bits, a ring the rotation."""
    label, across = 150.0, int((WIDTH - 150.0) / TILE)
    marks, y = [], 4.0
    for name, members in groupby(sites, key=lambda site: block_of(site.plan.site)):
        group = list(members)
        shown = name if len(name) <= 22 else f"…{name[-21:]}"
        marks.append(_name(label - 8, y + 12, name, shown))
        for i, site in enumerate(group):
            marks.append(_tile(label + (i % across) * TILE, y + (i // across) * TILE, site, colours))
        y += math.ceil(len(group) / across) * TILE + 3
    return svg(WIDTH, y + 4, *marks, label="Bits and rotation of every site")


def bits_name(site: SiteAnalysis) -> str:
    """w4a4, or float."""
    return str(site.bits) if site.plan.quantised else "float"


def _tile(x: float, y: float, site: SiteAnalysis, colours: Mapping[str, str]) -> str:
    plan, size = site.plan, TILE - 2
    rotation = f"rotated H{plan.block}" if plan.block else "not rotated"
    tip = title(plan.site, f"{bits_name(site)}, {rotation}", *([plan.reason] if plan.reason else []))
    marks = [element("rect", x=x, y=y, width=size, height=size, rx=2, class_=colours[bits_name(site)])]
    if plan.block:
        marks.append(element("circle", cx=x + size / 2, cy=y + size / 2, r=3.6, class_="ring"))
    return element("g", tip, *marks)
