"""An analysis as one HTML file: no network, no fonts, no images; readable without JavaScript, in light and dark.

Everything that comes from the program is escaped, and the page's own policy lets nothing be loaded and no other
script run than the one that sorts the table, which it names by its hash.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from hqc.evaluation.analysis import SiteAnalysis
from hqc.evaluation.analysis_report import NUMBERS, Report, summary
from hqc.evaluation.html_plots import (
    HEAT_STEPS,
    MOST_BARS,
    bits_map,
    bits_name,
    heat_limit,
    outlier_plot,
    scale_heatmap,
    sensitivity_bars,
)
from hqc.evaluation.html_style import SORT_SCRIPT, STYLE
from hqc.evaluation.svg import element, escape

__all__ = ["html_report"]


def html_report(report: Report) -> str:
    """The whole page."""
    name = f"{report.measured['program']} at {report.measured['bits']}"
    body = [
        _heading(report, name),
        _section(
            "Summary",
            _summary(report),
            "Medians are over the sites that the plan rotates, of each site's median "
            "over timesteps. Kurtosis is the plain one: 3 for normal values.",
        ),
        *_plots(report),
        _section(
            "All sites",
            _table(report),
            "Medians over timesteps. Click a heading to sort. Rotation in brackets: "
            "what the numbers after rotation were measured with where the plan has none.",
        ),
    ]
    digest = base64.b64encode(hashlib.sha256(SORT_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    head = [
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        f"<title>{escape(name)}</title>",
        f"<style>{STYLE}</style>",
    ]
    page = ["<!DOCTYPE html>", '<html lang="en">', "<head>", *head, "</head>", "<body>", *body]
    return "\n".join([*page, f"<script>{SORT_SCRIPT}</script>", "</body>", "</html>", ""])


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


def _plots(report: Report) -> list[str]:
    sites = report.sites
    own = any(row.program_scale is not None for site in sites for row in site.rows)
    what = "The program's own scales" if own else "The scales with the smallest squared error, in the basis of the plan"
    note = f"{what}, each row against its own median: rows that change colour need a scale per timestep."
    parts = [
        _section(
            "Outliers",
            _dot_legend() + outlier_plot(sites),
            "One row a site in data-flow order, medians over "
            "timesteps. Rotation spreads outliers: the dot moves left, and the SNR at the same bits moves right.",
        ),
        _section("Scales over timesteps", _heat_legend(heat_limit(sites)) + scale_heatmap(sites), note),
    ]
    bars = sensitivity_bars(report) if report.sensitivity else ""
    more = f" The first {MOST_BARS} of {len(report.sensitivity)} sites." if len(report.sensitivity) > MOST_BARS else ""
    parts.append(_section("Sensitivity", bars, report.sensitivity_note + more))
    colours = _bit_colours(sites)
    legend = "".join(_swatch(css, name) for name, css in colours.items())
    legend += element("span", _mark("circle", "ring dark", cx=7, cy=7, r=3.6), "rotated", class_="key")
    note = "One tile a site, one line a block of the model."
    parts.append(_section("Bits", element("p", legend, class_="legend") + bits_map(sites, colours), note))
    return parts


def _bit_colours(sites: Sequence[SiteAnalysis]) -> Mapping[str, str]:
    """float is grey; bits from fewest to most go from dark to light."""
    names = sorted({bits_name(s) for s in sites if s.plan.quantised})
    colours = {name: f"b{min(i, 5)}" for i, name in enumerate(names)}
    return colours | ({"float": "bf"} if any(not s.plan.quantised for s in sites) else {})


def _mark(shape: str, css: str, **attributes: float) -> str:
    return element("svg", element(shape, class_=css, **attributes), width=14, height=14)


def _swatch(css: str, name: str) -> str:
    return element("span", _mark("rect", css, width=14, height=14, rx=2), escape(name), class_="key")


def _dot_legend() -> str:
    keys = {"before": "before rotation", "after": "after rotation", "could": "after a rotation that is not in the plan"}
    dots = [element("span", _mark("circle", css, cx=7, cy=7, r=4), name, class_="key") for css, name in keys.items()]
    return element("p", *dots, class_="legend")


def _heat_legend(limit: float) -> str:
    steps = range(2 * HEAT_STEPS + 1)
    boxes = [element("rect", x=i * 16, width=16, height=14, class_=f"h{i}") for i in steps]
    bar = element("svg", *boxes, width=16 * len(steps), height=14)
    low, high = f"{2**-limit:.2g} × median or less", f"{2**limit:.2g} × median or more"
    return element("p", element("span", low), bar, element("span", high), class_="legend")


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
    rotation = f"H{plan.block}" if plan.block else f"(H{site.block})" if site.block else "–"
    numbers = [sensitivity, *(site.median(number) for pair in NUMBERS.values() for number in pair)]
    numbers += [site.median(lambda row: row.program_snr_db)]
    numbers += [weight.max_over_rms, weight.kurtosis, weight.snr_db]
    texts = [plan.kind, str(plan.in_channels), str(plan.out_channels), bits_name(site), rotation]
    name = escape(plan.site).replace(".", ".<wbr>")
    cells = [element("th", name, scope="row"), *(element("td", escape(text)) for text in texts)]
    cells += [element("td", f"{n:.3g}", data_value=repr(n)) if n is not None else element("td", "–") for n in numbers]
    return element("tr", *cells, title=plan.reason or None)
