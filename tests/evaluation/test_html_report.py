"""The HTML report: one file, no network, every site once in its table, hostile names harmless, the same every time."""

import base64
import hashlib
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from hqc.evaluation.analysis import Basis, SiteAnalysis, SiteRow, WeightNumbers
from hqc.evaluation.analysis_report import Report
from hqc.evaluation.html_plots import block_of, heat_limit, scales_of
from hqc.evaluation.html_report import html_report
from hqc.evaluation.html_style import SORT_SCRIPT
from hqc.evaluation.sensitivity import Sensitivity
from hqc.plan import Bits, SitePlan

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


def svgs(page: str) -> Iterator[ElementTree.Element]:
    for text in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL):
        yield ElementTree.fromstring(text)


NAMES = ("conv_in", "down_blocks.0.resnets.0.conv1", "down_blocks.1.attn.to_q", "mid_block.conv", "conv_out")


def test_every_site_is_once_in_the_table() -> None:
    page = _Page(html_report(report(NAMES)))
    assert page.rows == list(NAMES)
    assert page.texts["h1"] == ["tiny.hqc at w4a4"]
    assert page.texts["h2"] == ["Summary", "Outliers", "Scales over timesteps", "Sensitivity", "Bits", "All sites"]
    shown = " ".join(page.texts["dt"] + page.texts["dd"])
    assert all(word in shown for word in ("seed", "3", "sampler", "DDIMScheduler", "timesteps", "1, 501"))


def test_nothing_is_loaded_and_only_the_pages_own_script_runs() -> None:
    text = html_report(report(NAMES))
    page = _Page(text)
    assert "http://" not in text.replace("http-equiv", "")
    assert "https://" not in text
    assert "url(" not in text
    assert "@import" not in text
    assert not [tag for tag, given in page.tags if tag in ("link", "img", "iframe", "object") or "src" in given]
    assert [tag for tag, _ in page.tags].count("script") == 1
    (policy,) = [g["content"] for t, g in page.tags if t == "meta" and g.get("http-equiv") == "Content-Security-Policy"]
    digest = base64.b64encode(hashlib.sha256(SORT_SCRIPT.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "".join(page.texts["script"]) == SORT_SCRIPT


def test_the_plots_are_well_formed_and_complete() -> None:
    drawn = list(svgs(html_report(report(NAMES))))
    plots = {svg.get("aria-label"): svg for svg in drawn if svg.get("role") == "img"}
    assert len(plots) == 4
    dots = plots["Outliers and SNR per site before and after rotation"]
    assert len(list(dots.iter("circle"))) == 2 * 2 * len(NAMES)
    heat = plots["Activation scale of every site over timesteps"]
    assert len([r for r in heat.iter("rect") if (r.get("class") or "").startswith("h")]) == 2 * len(NAMES)
    bars = [r for r in plots["Sites by sensitivity"].iter("rect") if r.get("class") == "bar"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths == sorted(widths, reverse=True)
    assert widths[0] == pytest.approx(5 * widths[-1], rel=1e-3)  # 5 % and 1 %
    tiles = list(plots["Bits and rotation of every site"].iter("rect"))
    assert len(tiles) == len(NAMES)


def test_the_ranking_draws_the_first_thirty() -> None:
    names = tuple(f"blocks.{i}.conv" for i in range(283))
    text = html_report(report(names))
    page = _Page(text)
    assert page.rows == list(names)
    bars = [given for tag, given in page.tags if given.get("class") == "bar"]
    assert len(bars) == 30
    assert len(text) < 1_500_000


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(name: str) -> None:
    hostile = report((name, "conv"))
    hostile = replace(hostile, measured={**hostile.measured, "program": name, name: name}, sensitivity_note=name)
    text = html_report(hostile)
    text.encode("utf-8")
    page, calm = _Page(text), _Page(html_report(report(("x", "conv"))))
    shown = name.replace("\x00", "�").replace("\ud800", "�")
    assert page.rows == [shown, "conv"]
    assert page.texts["title"][0] == f"{shown} at w4a4"
    for tag in ("script", "img", "svg", "section"):
        assert [t for t, _ in page.tags].count(tag) == [t for t, _ in calm.tags].count(tag)
    assert not [given for _, given in page.tags if any(key.startswith("on") for key in given)]
    assert len(list(svgs(text))) == len(list(svgs(html_report(report(("x", "conv"))))))


def test_the_same_report_is_the_same_file() -> None:
    assert html_report(report(NAMES)) == html_report(report(NAMES))


def test_what_is_missing_is_said() -> None:
    empty = report(NAMES, sensitivity=(), sensitivity_note="Not measured: why.", all_sites_error=None)
    page = _Page(html_report(empty))
    assert "Not measured: why." in page.texts["p"]
    assert not [given for _, given in page.tags if given.get("class") == "bar"]
    mixed = replace(empty, sites=(site("a", bits=None, block=0), site("b", bits=Bits(8, 8), block=0)))
    page = _Page(html_report(mixed))
    assert page.rows == ["a", "b"]
    assert {"float", "w8a8"} <= set(page.texts["td"])
    assert {"float", "w8a8"} <= set(page.texts["span"])
    assert _Page(html_report(replace(empty, sites=()))).rows == []


def test_scales_are_the_programs_own_where_it_has_some() -> None:
    assert scales_of(site("a", own=True)) == {1.0: 0.2, 501.0: 0.2}
    assert scales_of(site("a", tilt=4.0)) == pytest.approx({1.0: 0.1, 501.0: 0.4})
    assert heat_limit([site("a")]) == 0.5
    assert heat_limit([site("a", tilt=4.0)] * 3) > 0.6  # 0.1 and 0.4 around 0.25
    assert [block_of(n) for n in NAMES] == ["conv_in", "down_blocks.0", "down_blocks.1", "mid_block", "conv_out"]
