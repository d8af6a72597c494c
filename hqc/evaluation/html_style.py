"""The look of the report, and its own scripts: one draws the plots, one sorts the table."""

__all__ = ["DRAW_SCRIPT", "SORT_SCRIPT", "STYLE"]

STYLE = """
:root { --paper:#ffffff; --ink:#1c2126; --soft:#5b6670; --line:#d9dee3; --band:#f3f5f7; --card:#f6f8fa;
  --mark:#1463b0; }
@media (prefers-color-scheme: dark) { :root { --paper:#14181c; --ink:#e6eaee; --soft:#9aa6b1; --line:#333b43;
  --band:#1b2025; --card:#1d2329; --mark:#6bb0f5; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 24px 28px 64px; max-width: 1200px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 24px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 40px 0 4px; padding-top: 12px; border-top: 1px solid var(--line); }
p { margin: 4px 0 10px; color: var(--soft); max-width: 80ch; }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(230px, 1fr)); gap: 2px 24px; margin: 0;
  font-size: 13px; }
dl dt { color: var(--soft); display: inline; } dl dt::after { content: ": "; }
dl dd { display: inline; margin: 0; overflow-wrap: anywhere; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(205px, 1fr)); gap: 12px; }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 14px; }
.card span, .card small { display: block; color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.card b { display: block; font-size: 20px; font-weight: 600; }
.plot { width: 100%; }
.scroll { overflow: auto; max-height: 80vh; border: 1px solid var(--line); border-radius: 8px; }
table { border-collapse: separate; border-spacing: 0; font-size: 11.5px; font-variant-numeric: tabular-nums;
  width: 100%; }
thead th { position: sticky; top: 0; background: var(--card); border-bottom: 1px solid var(--line);
  padding: 0; z-index: 1; }
thead button { all: unset; display: block; width: 100%; padding: 6px 5px; cursor: pointer; text-align: right;
  box-sizing: border-box; }
thead button:focus-visible { outline: 2px solid var(--mark); outline-offset: -2px; }
thead th:first-child button { text-align: left; }
thead small { display: block; color: var(--soft); font-weight: 400; }
thead th[aria-sort=ascending] button::before { content: "↑ "; }
thead th[aria-sort=descending] button::before { content: "↓ "; }
tbody th { text-align: left; font: 11px ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace;
  padding: 3px 8px;
  overflow-wrap: anywhere; min-width: 190px; }
tbody td { text-align: right; padding: 3px 5px; white-space: nowrap; }
tbody tr:nth-child(even) { background: var(--band); }
tbody tr:hover { outline: 1px solid var(--mark); outline-offset: -1px; }
@media print { .scroll { max-height: none; overflow: visible; } }
"""

SORT_SCRIPT = """
"use strict";
const table = document.getElementById("sites");
const key = (row, column) => {
  const cell = row.cells[column], given = cell.dataset.value, text = cell.textContent;
  const number = given !== undefined ? Number(given) : /^[0-9.]+$/.test(text) ? Number(text) : NaN;
  return Number.isNaN(number) ? text : number;
};
const compare = (a, b) => {
  if (a === "–" || b === "–") return a === b ? 0 : a === "–" ? 2 : -2;
  if (typeof a === "number" && typeof b === "number") return Math.sign(a - b);
  return String(a) < String(b) ? -1 : String(a) > String(b) ? 1 : 0;
};
table.tHead.addEventListener("click", event => {
  const head = event.target.closest("th");
  if (!head) return;
  const column = head.cellIndex, numbers = column > 5;
  const now = head.getAttribute("aria-sort");
  const up = now === null ? !numbers : now === "descending";
  for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const rows = Array.from(table.tBodies[0].rows);
  rows.sort((a, b) => {
    const found = compare(key(a, column), key(b, column));
    return Math.abs(found) === 2 ? found : up ? found : -found;
  });
  table.tBodies[0].append(...rows);
});
"""

DRAW_SCRIPT = """
"use strict";
const plots = Object.entries(JSON.parse(document.getElementById("plots").textContent));
const dark = window.matchMedia("(prefers-color-scheme: dark)");
const template = plot => plot.templates[dark.matches ? "dark" : "light"];
const buttons = [["toImage"], ["zoom2d", "pan2d"], ["zoomIn2d", "zoomOut2d", "resetScale2d"]];
const config = {responsive: true, displaylogo: false, typesetMath: false, modeBarButtons: buttons};
for (const [id, plot] of plots) Plotly.newPlot(id, plot.data, {...plot.layout, template: template(plot)}, config);
dark.addEventListener("change", () => {
  for (const [id, plot] of plots) Plotly.relayout(id, {template: template(plot)});
});
"""
