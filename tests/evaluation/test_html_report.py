"""The HTML report: one file, no network, every site in table and plots, hostile names harmless, reproducible."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from plotly.offline import get_plotlyjs

from hqc.bits import Bits
from hqc.evaluation.analysis import Basis, SiteAnalysis, SiteRow, WeightNumbers
from hqc.evaluation.analysis_report import Report
from hqc.evaluation.html_plots import block_of, heat_limit, scales_of
from hqc.evaluation.html_report import html_report
from hqc.evaluation.html_style import DRAW_SCRIPT, SORT_SCRIPT
from hqc.evaluation.sensitivity import Sensitivity
from hqc.plan import SitePlan

VOID = {"meta", "wbr", "br", "link", "img"}
HOSTILE = (
    "<script>alert(1)</script>",
    "\"><img src=x onerror='x'>",
    "</title></svg><!--",
    "a\x00b\ud800",
    "&lt;",
    "b[0]",
)


class _Page(HTMLParser):
    """Checks that elements nest, and collects what the tests ask for."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self.rows: list[str] = []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "th" and dict(attrs).get("scope") == "row":
            self.rows.append("")
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.stack:
            self.texts.setdefault(self.stack[-1], []).append(data)
            if self.stack[-1] == "th" and "tbody" in self.stack:
                self.rows[-1] += data


W4A4 = Bits(4, 4)


def site(name: str, *, block: int = 32, bits: Bits | None = W4A4, own: bool = False, tilt: float = 1.0) -> SiteAnalysis:
    plan = SitePlan(name, "conv2d", 64, 64, bits and bits.weight, bits and bits.activation, block)
    rows = tuple(
        SiteRow(
            timestep,
            100,
            5.0,
            1.0,
            Basis(5.0, 9.0, 0.1 * tilt**i, 15.0),
            Basis(3.0, 3.0, 0.1 * tilt**i, 19.0) if block else None,
            0.2 if own else None,
            18.0 if own else None,
        )
        for i, timestep in enumerate((1.0, 501.0))
    )
    return SiteAnalysis(plan, bits or Bits(4, 4), block, WeightNumbers(4.0, 3.0, 22.0), rows)


def report(names: tuple[str, ...], **options: object) -> Report:
    sites = tuple(site(name) for name in names)
    found = tuple(Sensitivity(name, 0.01 * (i + 1), ((1.0, 0.01),)) for i, name in enumerate(names))
    measured = {"program": "tiny.hqc", "bits": "w4a4", "seed": 3, "timesteps": [1.0, 501.0], "sampler": "DDIMScheduler"}
    return replace(Report(measured, sites, found, "How it was measured.", 0.05), **options)  # type: ignore[arg-type]


def without_plotly(text: str) -> str:
    """The page without the library, which is long and not ours."""
    return text.replace(get_plotlyjs(), "")


def page_of(text: str) -> _Page:
    return _Page(without_plotly(text))


def plots_of(text: str) -> dict[str, Any]:
    """The data of the plots, as the page's script reads them."""
    (found,) = re.findall(r'<script type="application/json" id="plots">(.*?)</script>', text, flags=re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


NAMES = ("conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.attn.to_q", "mid_block.conv", "conv_out")


def test_every_site_is_once_in_the_table() -> None:
    page = page_of(html_report(report(NAMES)))
    assert page.rows == list(NAMES)
    assert page.texts["h1"] == ["tiny.hqc at w4a4"]
    assert page.texts["h2"] == ["Summary", "Outliers", "Scales over timesteps", "Sensitivity", "Bits", "All sites"]
    shown = " ".join(page.texts["dt"] + page.texts["dd"])
    assert all(word in shown for word in ("seed", "3", "sampler", "DDIMScheduler", "timesteps", "1, 501"))


def test_nothing_is_loaded_and_only_the_pages_own_scripts_run() -> None:
    whole = html_report(report(NAMES))
    text = without_plotly(whole)
    page = _Page(text)
    assert whole.count(get_plotlyjs()) == 1
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not [tag for tag, given in page.tags if tag in ("link", "img", "iframe", "object") or "src" in given]
    assert [g.get("type") for tag, g in page.tags if tag == "script"] == ["application/json", None, None, None]
    (policy,) = [g["content"] for t, g in page.tags if t == "meta" and g.get("http-equiv") == "Content-Security-Policy"]
    scripts = re.findall(r"<script>(.*?)</script>", whole, flags=re.DOTALL)
    assert scripts == [get_plotlyjs(), DRAW_SCRIPT, SORT_SCRIPT]
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{found}'" for found in hashes)
    images = "img-src data: blob:"
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; {images}; script-src {allowed}"


def test_the_plots_have_every_site() -> None:
    text = html_report(report(NAMES))
    plots = plots_of(text)
    assert list(plots) == sorted(["outliers", "scales", "sensitivity", "bits"])
    assert {g["id"] for t, g in page_of(text).tags if t == "div" and g.get("class") == "plot"} == set(plots)
    dots = [trace for trace in plots["outliers"]["data"] if trace["mode"] == "markers"]
    assert [trace["x"] for trace in dots] == [[5.0] * 5, [3.0] * 5, [], [15.0] * 5, [19.0] * 5, []]
    assert [line.split("<br>")[0] for line in dots[0]["hovertext"]] == list(NAMES)
    (heat,) = plots["scales"]["data"]
    assert heat["x"] == ["501", "1"]
    assert heat["z"] == [[0.0, 0.0]] * 5
    (bars,) = plots["sensitivity"]["data"]
    assert bars["x"] == pytest.approx([5.0, 4.0, 3.0, 2.0, 1.0])
    assert bars["hovertext"][0] == "conv_out<br>5 %<br>t=1: 1 %"
    tiles = [trace for trace in plots["bits"]["data"] if trace["type"] == "bar"]
    assert [(trace["name"], len(trace["x"])) for trace in tiles] == [("w4a4", 5)]


def test_every_plot_has_colours_for_light_and_dark() -> None:
    for plot in plots_of(html_report(report(NAMES))).values():
        light, dark = (plot["templates"][name]["layout"] for name in ("light", "dark"))
        assert "template" not in plot["layout"]
        assert light.keys() == dark.keys()
        assert light["paper_bgcolor"] == "#ffffff"
        assert light["font"]["color"] == dark["font"]["color"].replace("#e6eaee", "#1c2126")


def test_a_rotation_that_is_not_in_the_plan_is_a_ring_and_long_names_are_whole_when_hovered() -> None:
    name = "blocks.0." + "x" * 90
    unplanned = replace(site(name), plan=replace(site(name).plan, block=0))
    plots = plots_of(html_report(report((), sites=(unplanned,))))
    ring = plots["outliers"]["data"][2]
    assert ring["marker"]["symbol"] == "circle-open"
    assert ring["hovertext"] == [f"{name}<br>before 5, after 3 (H32, not in the plan)"]
    (label,) = plots["outliers"]["layout"]["yaxis"]["ticktext"]
    assert label == "…" + "x" * 61


def test_the_ranking_draws_the_first_thirty() -> None:
    names = tuple(f"blocks.{i}.conv" for i in range(283))
    text = html_report(report(names))
    page = page_of(text)
    assert page.rows == list(names)
    (bars,) = plots_of(text)["sensitivity"]["data"]
    assert len(bars["x"]) == 30
    assert len(without_plotly(text)) < 1_500_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    hostile = report((name, "conv"))
    hostile = replace(hostile, measured={**hostile.measured, "program": name, name: name}, sensitivity_note=name)
    text = html_report(hostile)
    text.encode("utf-8")
    page, calm = page_of(text), page_of(html_report(report(("x", "conv"))))
    shown = name.replace("\x00", "�").replace("\ud800", "�")
    assert page.rows == [shown, "conv"]
    assert page.texts["title"][0] == f"{shown} at w4a4"
    for tag in ("script", "img", "svg", "section"):
        assert [t for t, _ in page.tags].count(tag) == [t for t, _ in calm.tags].count(tag)
    assert not [given for _, given in page.tags if any(key.startswith("on") for key in given)]
    plain = shown.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    plots = plots_of(text)
    assert plots["scales"]["layout"]["yaxis"]["ticktext"] == [plain, "conv"]
    for trace in (trace for plot in plots.values() for trace in plot["data"]):
        for hover in str(trace.get("hovertext", "")).split("<br>"):
            assert "<" not in hover


def test_the_same_report_is_the_same_file() -> None:
    assert html_report(report(NAMES)) == html_report(report(NAMES))


def test_what_is_missing_is_said() -> None:
    empty = report(NAMES, sensitivity=(), sensitivity_note="Not measured: why.", all_sites_error=None)
    page = page_of(html_report(empty))
    assert "Not measured: why." in page.texts["p"]
    assert "sensitivity" not in plots_of(html_report(empty))
    mixed = replace(empty, sites=(site("a", bits=None, block=0), site("b", bits=Bits(8, 8), block=0)))
    page = page_of(html_report(mixed))
    assert page.rows == ["a", "b"]
    assert {"float", "w8a8"} <= set(page.texts["td"])
    tiles = [trace["name"] for trace in plots_of(html_report(mixed))["bits"]["data"] if trace["type"] == "bar"]
    assert tiles == ["w8a8", "float"]
    assert page_of(html_report(replace(empty, sites=()))).rows == []


def test_scales_are_the_programs_own_where_it_has_some() -> None:
    assert scales_of(site("a", own=True)) == {1.0: 0.2, 501.0: 0.2}
    assert scales_of(site("a", tilt=4.0)) == pytest.approx({1.0: 0.1, 501.0: 0.4})
    assert heat_limit([site("a")]) == 0.5
    assert heat_limit([site("a", tilt=4.0)] * 3) > 0.6  # 0.1 and 0.4 around 0.25
    assert [block_of(n) for n in NAMES] == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "conv_out"]
