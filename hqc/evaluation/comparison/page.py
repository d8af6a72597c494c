"""The comparison as one HTML file that needs nothing else: the table, its notes, the plots as SVG."""

from hqc.evaluation.comparison.plots import plots_bytes
from hqc.evaluation.comparison.rows import Comparison
from hqc.evaluation.comparison.table import Sheet, sheet_of
from hqc.evaluation.html_style import STYLE
from hqc.evaluation.markup import element, escape

__all__ = ["page"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_OWN = """
body { max-width: 1700px; }
thead th { padding: 6px 5px; }
li { color: var(--soft); }
svg { width: 100%; height: auto; }
"""


def page(comparison: Comparison) -> str:
    """The whole file."""
    sheet, title = sheet_of(comparison), f"Recipes on {comparison.program}"
    svg = plots_bytes(comparison, "svg").decode()
    head = element(
        "head",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">',
        element("title", escape(title)),
        element("style", STYLE + _OWN),
    )
    notes = element("ul", *(element("li", escape(note)) for note in sheet.notes))
    plots = svg[svg.index("<svg") :]
    body = element("body", element("h1", escape(title)), element("div", _table(sheet), class_="scroll"), notes, plots)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _table(sheet: Sheet) -> str:
    heads = element("tr", *(element("th", escape(head)) for head in sheet.heads))
    rows = [element("tr", *(element("td", escape(cell)) for cell in row)) for row in sheet.rows]
    return element("table", element("thead", heads), element("tbody", *rows))
