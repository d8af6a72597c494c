"""The plots of an analysis by plotly: paired dots, a heatmap, bars, and a map of bits. Rows are in data-flow order.

Colours come from the templates of `html_theme`, light and dark: a trace names none but what fits both. Plotly reads a
little HTML in every text, so whatever comes from a program is escaped before it goes there.
"""

import math
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any

from hqc.evaluation.analysis import SiteAnalysis
from hqc.evaluation.analysis_report import NUMBERS, Report
from hqc.evaluation.html_theme import NEUTRAL
from hqc.evaluation.markup import escape

if TYPE_CHECKING:
    import plotly.graph_objects as go

__all__ = [
    "MOST_BARS",
    "bits_figure",
    "bits_name",
    "block_of",
    "heat_limit",
    "outlier_figure",
    "scale_figure",
    "scales_of",
    "sensitivity_figure",
]

LONGEST_LABEL = 62
MOST_BARS = 30
"""Sites in the sensitivity ranking."""
LEFT, ABOVE, BELOW = 388, 64, 16  # px
_LOG_TICKS = {
    "tickmode": "array",
    "tickvals": [m * 10.0**d for d in range(-2, 7) for m in (1, 2, 5)],
    "tickformat": "~g",
}
ACROSS = 58  # tiles in a line of the map of bits


def block_of(site: str) -> str:
    """The part of the model that a site belongs to: down_blocks.1, mid_block, conv_in."""
    parts = site.split(".")
    return ".".join(parts[:2]) if len(parts) > 2 and parts[1].isdigit() else parts[0]


def bits_name(site: SiteAnalysis) -> str:
    """w4a4, or float; a star marks an asymmetric operand."""
    return site.plan.widths


def _row_height(count: int) -> int:
    """Smaller rows for large models, still readable."""
    return 14 if count <= 120 else 11


def _plain(text: str) -> str:
    """Text in which plotly, which knows no &quot;, sees no markup."""
    return escape(text, quote=False)


def _label(name: str, longest: int = LONGEST_LABEL) -> str:
    """The end of a long name, which tells sites apart, escaped for plotly."""
    return _plain(name if len(name) <= longest else f"…{name[-longest + 1 :]}")


def _lines(*texts: str) -> str:
    """A hover text of some lines, escaped for plotly."""
    return "<br>".join(map(_plain, texts))


def _shown(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _row_axis(names: Sequence[str]) -> dict[str, Any]:
    """Site names at the left, the first on top."""
    return {
        "tickmode": "array",
        "tickvals": list(range(len(names))),
        "ticktext": [_label(name) for name in names],
        "tickfont": {"size": 10, "family": "ui-monospace, DejaVu Sans Mono, Menlo, Consolas, monospace"},
        "range": [len(names) - 0.5, -0.5],
        "showgrid": False,
        "zeroline": False,
    }


def _bands(sites: Sequence[SiteAnalysis]) -> list[dict[str, Any]]:
    """A band behind every other block of the model, in a colour that fits light and dark."""
    shapes, top = [], 0
    for number, (_, group) in enumerate(groupby(sites, key=lambda site: block_of(site.plan.site))):
        count = len(list(group))
        if number % 2:
            place = {"x0": 0, "x1": 1, "xref": "paper", "y0": top - 0.5, "y1": top + count - 0.5, "yref": "y"}
            shapes.append(
                {"type": "rect", "layer": "below", "line_width": 0, "fillcolor": NEUTRAL, "opacity": 0.1, **place}
            )
        top += count
    return shapes


def _figure(rows: int, height: float, **layout: Any) -> "go.Figure":
    """An empty figure with a plot area of `rows` of some height."""
    import plotly.graph_objects as go

    figure = go.Figure()
    margin = {"l": LEFT, "r": 16, "t": ABOVE, "b": BELOW}
    legend = {"orientation": "h", "x": 0, "xanchor": "left", "yref": "container", "y": 1, "yanchor": "top"}
    figure.update_layout(
        {
            "height": ABOVE + BELOW + max(1, rows) * height,
            "margin": margin,
            "legend": legend,
            "template": None,
            **layout,
        }
    )
    return figure


# ---- outliers ------------------------------------------------------------------------------------------------------


def outlier_figure(sites: Sequence[SiteAnalysis]) -> "go.Figure":
    """Two panels on the same rows, max/RMS and SNR, each before and after rotation as a pair of dots."""
    axis = {"side": "top", "title_standoff": 4}
    figure = _figure(
        len(sites),
        _row_height(len(sites)),
        yaxis=_row_axis([site.plan.site for site in sites]),
        xaxis={
            **axis,
            "domain": [0, 0.48],
            "type": "log",
            "title_text": "max/RMS (log scale; left is better)",
            **_LOG_TICKS,
        },
        xaxis2={**axis, "domain": [0.52, 1], "title_text": "activation SNR, dB (right is better)"},
        shapes=_bands(sites),
    )
    for panel, (key, place) in enumerate((("max_over_rms", "x"), ("snr_db", "x2"))):
        pairs = [tuple(site.median(number) for number in NUMBERS[key]) for site in sites]
        _add_pairs(figure, sites, pairs, place, legend=panel == 0)
    return figure


def _add_pairs(
    figure: "go.Figure",
    sites: Sequence[SiteAnalysis],
    pairs: Sequence[tuple[float | None, ...]],
    place: str,
    legend: bool,
) -> None:
    """Four traces: dots before, after, after a rotation that is not in the plan; and what joins them."""
    texts = [_pair_text(site, pair) for site, pair in zip(sites, pairs, strict=True)]
    common = {"xaxis": place, "yaxis": "y", "hovertemplate": "%{hovertext}<extra></extra>"}
    kinds = [
        ("before rotation", 0, [True] * len(sites), "circle"),
        ("after rotation", 1, [bool(site.plan.block) for site in sites], "circle"),
        ("after a rotation that is not in the plan", 1, [not site.plan.block for site in sites], "circle-open"),
    ]
    for name, side, chosen, symbol in kinds:
        rows = [row for row, pair in enumerate(pairs) if chosen[row] and pair[side] is not None]
        figure.add_scatter(
            x=[pairs[row][side] for row in rows],
            y=rows,
            hovertext=[texts[row] for row in rows],
            mode="markers",
            marker={"symbol": symbol, "size": 7},
            name=name,
            legendgroup=name,
            showlegend=legend,
            **common,
        )
    joined = [row for row, pair in enumerate(pairs) if None not in pair]
    figure.add_scatter(
        x=[x for row in joined for x in (*pairs[row], None)],
        y=[y for row in joined for y in (row, row, None)],
        mode="lines",
        line={"width": 1, "color": NEUTRAL},
        hoverinfo="skip",
        showlegend=False,
        xaxis=place,
        yaxis="y",
        zorder=-1,
    )


def _pair_text(site: SiteAnalysis, pair: Sequence[float | None]) -> str:
    rotation = f"{site.rotation}{'' if site.plan.block else ', not in the plan'}" if site.block else "no rotation fits"
    return _lines(site.plan.site, f"before {_shown(pair[0])}, after {_shown(pair[1])} ({rotation})")


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


def scale_figure(sites: Sequence[SiteAnalysis]) -> "go.Figure":
    """Site × timestep, noise at the left: each cell is log₂(scale/the site's median scale)."""
    limit = heat_limit(sites)
    times = sorted({row.timestep for site in sites for row in site.rows}, reverse=True)
    ratios = [_ratios(site) for site in sites]
    bar = {
        "orientation": "h",
        "x": 0,
        "xanchor": "left",
        "y": 1,
        "yref": "container",
        "yanchor": "top",
        "len": 0.5,
        "thickness": 10,
        "tickvals": [-limit, 0, limit],
        "ticktext": [f"{2**-limit:.2g} × median", "median", f"{2**limit:.2g} × median"],
    }
    figure = _figure(
        len(sites),
        _row_height(len(sites)),
        yaxis=_row_axis([site.plan.site for site in sites]),
        xaxis={"side": "top", "type": "category", "title_text": "timestep, from noise to image", "title_standoff": 4},
        coloraxis={"cmin": -limit, "cmax": limit, "colorbar": bar},
        margin={"l": LEFT, "r": 16, "t": ABOVE + 40, "b": BELOW},
    )
    figure.layout.height += 40
    figure.add_heatmap(
        x=[f"{t:g}" for t in times],
        y=list(range(len(sites))),
        z=[[found[t][1] if t in found else None for t in times] for found in ratios],
        hovertext=[[_cell_text(site, t, found) for t in times] for site, found in zip(sites, ratios, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
        coloraxis="coloraxis",
        ygap=1,
    )
    return figure


def _cell_text(site: SiteAnalysis, time: float, found: dict[float, tuple[float, float]]) -> str:
    if time not in found:
        return _lines(site.plan.site, f"t={time:g}: not seen")
    scale, ratio = found[time]
    return _lines(site.plan.site, f"t={time:g}: scale {scale:.4g}, {2**ratio:.2f} × median")


# ---- sensitivity ---------------------------------------------------------------------------------------------------


def sensitivity_figure(report: Report) -> "go.Figure":
    """The most sensitive sites, one bar each, in percent of the output's norm."""
    ranking = report.ranking()[:MOST_BARS]
    bits = {site.plan.site: site.bits for site in report.sites}
    title = "relative output error with only this site quantised, %"
    figure = _figure(
        len(ranking),
        18,
        yaxis=_row_axis([found.site for found in ranking]),
        xaxis={"side": "top", "title_text": title, "title_standoff": 4, "rangemode": "tozero"},
        margin={"l": LEFT, "r": 90, "t": ABOVE, "b": BELOW},
        bargap=0.35,
    )
    by_time = [[f"t={t:g}: {100 * e:.3g} %" for t, e in found.by_timestep] for found in ranking]
    figure.add_bar(
        x=[100 * found.error for found in ranking],
        y=list(range(len(ranking))),
        orientation="h",
        text=[f"{100 * found.error:.3g} %  {bits[found.site]}" for found in ranking],
        textposition="outside",
        cliponaxis=False,
        hovertext=[_lines(f.site, f"{100 * f.error:.3g} %", *t) for f, t in zip(ranking, by_time, strict=True)],
        hovertemplate="%{hovertext}<extra></extra>",
    )
    return figure


# ---- bits ----------------------------------------------------------------------------------------------------------


def bits_figure(sites: Sequence[SiteAnalysis]) -> "go.Figure":
    """One tile a site, a line or more a block of the model: colour is the bits, a ring the rotation."""
    places, labels, line = [], [], 0
    for name, members in groupby(sites, key=lambda site: block_of(site.plan.site)):
        group = list(members)
        labels.append((line, name))
        places += [(i % ACROSS, line + i // ACROSS, site) for i, site in enumerate(group)]
        line += math.ceil(len(group) / ACROSS)
    rows = {"tickvals": [at for at, _ in labels], "ticktext": [_label(name, 22) for _, name in labels]}
    figure = _figure(
        line,
        20,
        yaxis={**_row_axis([]), **rows, "range": [line - 0.5, -0.5]},
        xaxis={"visible": False, "range": [-0.6, ACROSS - 0.4]},
        margin={"l": 150, "r": 16, "t": 34, "b": BELOW},
        barmode="overlay",
        bargap=0,
    )
    names = sorted({bits_name(site) for _, _, site in places if site.plan.quantised})
    for name in [*names, "float"]:
        tiles = [place for place in places if bits_name(place[2]) == name]
        if tiles:
            _add_tiles(figure, name, tiles)
    rotated = [place for place in places if place[2].plan.block]
    figure.add_scatter(
        x=[x for x, _, _ in rotated],
        y=[y for _, y, _ in rotated],
        mode="markers",
        marker={"symbol": "circle-open", "size": 7, "color": "#ffffff", "line": {"width": 1.8}},
        showlegend=False,
        hoverinfo="skip",
    )
    return figure


def _add_tiles(figure: "go.Figure", name: str, tiles: Sequence[tuple[int, int, SiteAnalysis]]) -> None:
    figure.add_bar(
        x=[x for x, _, _ in tiles],
        y=[0.84] * len(tiles),
        base=[y - 0.42 for _, y, _ in tiles],
        width=0.84,
        name=name,
        marker={"color": NEUTRAL} if name == "float" else {},
        hovertext=[_tile_text(site) for _, _, site in tiles],
        hovertemplate="%{hovertext}<extra></extra>",
    )


def _tile_text(site: SiteAnalysis) -> str:
    plan = site.plan
    rotation = f"rotated {plan.rotation_name}" if plan.block else "not rotated"
    return _lines(plan.site, f"{bits_name(site)}, {rotation}", *([plan.reason] if plan.reason else []))
