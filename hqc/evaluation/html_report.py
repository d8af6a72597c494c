"""An analysis as one HTML file: no network, no fonts, no images; plots by plotly, in light and dark.

Everything that comes from the program is escaped, and the page's own policy lets nothing be loaded and no other
scripts run than the three that it names by their hashes: plotly's, the one that draws, the one that sorts. What they
draw is data, which no browser runs. Without JavaScript the summary and the table are there.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from hqc.evaluation.analysis import SiteAnalysis
from hqc.evaluation.analysis_report import NUMBERS, Report, summary
from hqc.evaluation.html_plots import (
    MOST_BARS,
    bits_figure,
    bits_name,
    outlier_figure,
    scale_figure,
    sensitivity_figure,
)
from hqc.evaluation.html_style import DRAW_SCRIPT, SORT_SCRIPT, STYLE
from hqc.evaluation.html_theme import templates
from hqc.evaluation.markup import element, escape

__all__ = ["html_report"]


def html_report(report: Report) -> str:
    """The whole page."""
    name = f"{report.measured['program']} at {report.measured['bits']}"
    figures = _figures(report)
    body = [
        _heading(report, name),
        _section(
            "Summary",
            _summary(report),
            "Medians are over the sites that the plan rotates, of each site's median "
            "over timesteps. Kurtosis is the plain one: 3 for normal values.",
        ),
        *_plots(report, figures),
        _section(
            "All sites",
            _table(report),
            "Medians over timesteps. Click a heading to sort. Rotation in brackets: "
            "what the numbers after rotation were measured with where the plan has none.",
        ),
    ]
    scripts = [_plotly(), DRAW_SCRIPT, SORT_SCRIPT]
    allowed = " ".join(f"'sha256-{_digest(script)}'" for script in scripts)
    # Plotly draws heatmaps as images of its own making, and saves a plot as one.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src {allowed}"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(name)}</title>",
        f"<style>{STYLE}</style>",
    ]
    data = f'<script type="application/json" id="plots">{_data(figures)}</script>'
    page = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body, data]
    return "\n".join([*page, *(f"<script>{script}</script>" for script in scripts), "</body>", "</html>", ""])


@cache
def _plotly() -> str:
    """plotly.js as it came with the package; line ends as a browser reads them, which the hash is of."""
    from plotly.offline import get_plotlyjs

    script: str = get_plotlyjs()
    return script.replace("\r\n", "\n").replace("\r", "\n")


@cache
def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _data(figures: Mapping[str, Any]) -> str:
    """The figures with their templates as JSON in which nothing can end the element that holds it."""
    made = {}
    for name, figure in figures.items():
        plot = json.loads(figure.to_json())
        plot["layout"].pop("template", None)
        made[name] = {**plot, "templates": templates("dots" if name == "outliers" else "bits")}
    return json.dumps(made, separators=(",", ":"), sort_keys=True).replace("<", "\\u003c").replace(">", "\\u003e")


def _section(title: str, content: str, note: str = "") -> str:
    return element("section", element("h2", escape(title)), element("p", escape(note)) if note else "", content)


def _heading(report: Report, name: str) -> str:
    shown = [(key.replace("_", " "), value) for key, value in report.measured.items() if value not in ("", None)]
    items = [element("div", element("dt", escape(key)), element("dd", escape(_plain(value)))) for key, value in shown]
    return element("header", element("h1", escape(name)), element("dl", *items))


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        values = [f"{v:g}" if isinstance(v, float) else str(v) for v in value]
        return ", ".join(values) if len(values) <= 24 else f"{', '.join(values[:3])}, … {values[-1]} ({len(values)})"
    return f"{value:g}" if isinstance(value, float) else str(value)


# ---- summary -------------------------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    data = summary(report)
    counts = f"{data['quantised']} quantised, {data['rotated']} rotated"
    cards = [("Sites", str(data["sites"]), counts)]
    for key, name, unit in (("max_over_rms", "max/RMS", ""), ("kurtosis", "Kurtosis", ""), ("snr_db", "SNR", " dB")):
        before, after = data[key]["before"], data[key]["after"]
        if before is not None and after is not None:
            cards.append((f"{name}, before → after", f"{before:.3g} → {after:.3g}{unit}", "rotation, activations"))
    if data["snr_gain_db"] is not None:
        most, where = data["snr_gain_db"]["most"], data["snr_gain_db"]["most_site"]
        cards.append(("Largest gain by rotation", f"{most:+.3g} dB SNR", where))
    if data["weight_snr_db"] is not None:
        cards.append(("Weight SNR", f"{data['weight_snr_db']:.3g} dB", "median of the quantised sites"))
    if data["all_sites_error"] is not None:
        cards.append(("Output error", f"{100 * data['all_sites_error']:.3g} %", "every site quantised at once"))
    if data["most_sensitive"]:
        first = data["most_sensitive"][0]
        cards.append(("Most sensitive", f"{100 * first['error']:.3g} %", first["site"]))
    parts = [
        element("div", element("span", escape(n)), element("b", escape(v)), element("small", escape(s)), class_="card")
        for n, v, s in cards
    ]
    return element("div", *parts, class_="cards")


# ---- plots ---------------------------------------------------------------------------------------------------------


def _figures(report: Report) -> dict[str, Any]:
    """A figure by the id of its place in the page; none for what was not measured."""
    figures = {"outliers": outlier_figure(report.sites), "scales": scale_figure(report.sites)}
    if report.sensitivity:
        figures["sensitivity"] = sensitivity_figure(report)
    return figures | {"bits": bits_figure(report.sites)}


def _plots(report: Report, figures: Mapping[str, Any]) -> list[str]:
    own = any(row.program_scale is not None for site in report.sites for row in site.rows)
    what = "The program's own scales" if own else "The scales with the smallest squared error, in the basis of the plan"
    more = f" The first {MOST_BARS} of {len(report.sensitivity)} sites." if len(report.sensitivity) > MOST_BARS else ""
    notes = {
        "outliers": "One row a site in data-flow order, medians over timesteps. Rotation spreads outliers: the dot "
        "moves left, and the SNR at the same bits moves right. Drag to zoom, double-click to come back.",
        "scales": f"{what}, each row against its own median: rows that change colour need a scale per timestep.",
        "sensitivity": report.sensitivity_note + more,
        "bits": "One tile a site, one line a block of the model; a ring is a rotation.",
    }
    titles = {"scales": "Scales over timesteps"}
    return [
        _section(titles.get(name, name.capitalize()), _place(name, figures[name]) if name in figures else "", note)
        for name, note in notes.items()
    ]


def _place(name: str, figure: Any) -> str:
    """Where a plot is drawn, as high as it will be, so that the page does not move."""
    note = element("noscript", element("p", "The plots need JavaScript; the table at the end has every number."))
    label = {"role": "img", "aria_label": name}
    return note + element("div", id=name, class_="plot", style=f"height:{figure.layout.height:g}px", **label)


# ---- table ---------------------------------------------------------------------------------------------------------

_COLUMNS: Sequence[tuple[str, str]] = (
    *(("site", ""), ("kind", ""), ("in", "channels"), ("out", "channels"), ("bits", ""), ("rotation", "")),
    *(("sensitivity", "%"), ("max/RMS", "before"), ("max/RMS", "after"), ("kurtosis", "before"), ("kurtosis", "after")),
    *(("SNR", "before, dB"), ("SNR", "after, dB"), ("SNR", "own scale, dB")),
    *(("weight", "max/RMS"), ("weight", "kurtosis"), ("weight", "SNR, dB")),
)


def _table(report: Report) -> str:
    errors = {s.site: 100 * s.error for s in report.sensitivity}
    heads = [element("th", _sorter(name, unit), scope="col") for name, unit in _COLUMNS]
    rows = [_table_row(site, errors.get(site.plan.site)) for site in report.sites]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), id="sites")
    return element("div", table, class_="scroll")


def _sorter(name: str, unit: str) -> str:
    return element("button", escape(name), element("small", escape(unit)) if unit else "", type="button")


def _table_row(site: SiteAnalysis, sensitivity: float | None) -> str:
    plan, weight = site.plan, site.weight
    rotation = plan.rotation_name or (f"({site.rotation})" if site.block else "–")
    numbers = [sensitivity, *(site.median(number) for pair in NUMBERS.values() for number in pair)]
    numbers += [site.median(lambda row: row.program_snr_db)]
    numbers += [weight.max_over_rms, weight.kurtosis, weight.snr_db]
    texts = [plan.kind, str(plan.in_channels), str(plan.out_channels), bits_name(site), rotation]
    name = escape(plan.site).replace(".", ".<wbr>")
    cells = [element("th", name, scope="row"), *(element("td", escape(text)) for text in texts)]
    cells += [element("td", f"{n:.3g}", data_value=repr(n)) if n is not None else element("td", "–") for n in numbers]
    return element("tr", *cells, title=plan.reason or None)
