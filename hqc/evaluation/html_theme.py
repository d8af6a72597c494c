"""The colours of the report's plots as plotly templates: the page takes one of the two, and the other when asked."""

from typing import Any

__all__ = ["NEUTRAL", "templates"]

NEUTRAL = "#8a949d"
"""Grey that shows on light and on dark."""

_FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_LIGHT = {
    "paper": "#ffffff",
    "ink": "#1c2126",
    "soft": "#5b6670",
    "line": "#d9dee3",
    "dots": ["#c2570c", "#1463b0", "#1463b0", NEUTRAL],
    "bits": ["#0b4f8a", "#3f86c4", "#7fb2de", "#8a6fc0", "#b7a4dc", "#d9cdee"],
    "heat": ["#0b4f8a", "#5f9bd0", "#eef0f2", "#e48a55", "#973c0a"],
}
_DARK = {
    "paper": "#14181c",
    "ink": "#e6eaee",
    "soft": "#9aa6b1",
    "line": "#333b43",
    "dots": ["#f59a52", "#6bb0f5", "#6bb0f5", NEUTRAL],
    "bits": ["#3f86c4", "#1f5c99", "#7fb2de", "#8467c4", "#553f8a", "#b79df0"],
    "heat": ["#8cc6ff", "#437fb8", "#272c31", "#b56a24", "#ffbd80"],
}


def templates(kind: str) -> dict[str, Any]:
    """Light and dark for a plot whose traces take the colours of `dots` or of `bits`, in their order."""
    return {"light": _template(_LIGHT, kind), "dark": _template(_DARK, kind)}


def _template(theme: dict[str, Any], kind: str) -> dict[str, Any]:
    colours = theme["heat"]
    axis = {"gridcolor": theme["line"], "linecolor": theme["line"], "zerolinecolor": theme["line"], "fixedrange": False}
    x = {
        **axis,
        "tickfont": {"size": 10, "color": theme["soft"]},
        "title": {"font": {"size": 12, "color": theme["soft"]}},
    }
    hover = {"bgcolor": theme["paper"], "bordercolor": theme["soft"], "font": {"color": theme["ink"], "size": 12}}
    layout = {
        "paper_bgcolor": theme["paper"],
        "plot_bgcolor": theme["paper"],
        "font": {"color": theme["ink"], "family": _FONT, "size": 12},
        "colorway": theme[kind],
        "coloraxis": {"colorscale": [[i / (len(colours) - 1), c] for i, c in enumerate(colours)]},
        "xaxis": x,
        "yaxis": axis,
        "hoverlabel": {**hover, "align": "left", "namelength": -1},
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": theme["soft"], "activecolor": theme["ink"]},
    }
    return {"layout": layout}
