"""Reports: single-file HTML pages that contain their pictures and need no network."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from urllib.parse import quote

import numpy as np
from detectron2.utils.file_io import PathManager
from jinja2 import Environment
from markupsafe import Markup

from region_pretrain.files import write_text_atomic
from region_pretrain.reporting.boxes import to_png

_TEMPLATES = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)

_PAGE = _TEMPLATES.from_string("""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 84rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #8886; }
p { max-width: 60rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: left; }
td:not(:first-child) { white-space: nowrap; }
th { border-bottom: 2px solid #8888; white-space: nowrap; cursor: pointer; }
th[aria-sort=ascending]::after { content: " \\2191"; }
th[aria-sort=descending]::after { content: " \\2193"; }
.number { text-align: right; }
figure { margin: .5rem 0; }
figcaption { font-size: .85rem; opacity: .8; }
img { max-width: 100%; height: auto; display: block; }
.row { display: flex; flex-wrap: wrap; gap: .75rem; align-items: flex-start; }
.row figure { flex: 0 1 auto; max-width: 100%; }
.row .plot { flex: 1 1 22rem; max-width: 42rem; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
{% for section in sections %}
<section>
<h2>{{ section.title }}</h2>
{% for block in section.blocks %}
{{ block }}
{% endfor %}
</section>
{% endfor %}
<script>
{{ script }}</script>
</body>
</html>
""")

# A click on a column's header, or Enter, sorts its table: numbers first from high to low, text from
# A to Z, then the other way round. Empty cells stay last.
_SORT = Markup("""\
function sort(event) {
  const th = event.target.closest("th");
  if (!th || (event.type === "keydown" && event.key !== "Enter")) return;
  const body = th.closest("table").tBodies[0], shown = th.getAttribute("aria-sort");
  const cell = row => row.cells[th.cellIndex], number = row => cell(row).dataset.number;
  const empty = row => ["", "–"].includes(cell(row).textContent);
  const rows = [...body.rows], numeric = rows.some(row => number(row) !== undefined);
  const up = shown ? shown === "descending" : !numeric;
  rows.sort((a, b) => empty(a) - empty(b) || (up ? 1 : -1) * (
    number(a) !== undefined && number(b) !== undefined ? number(a) - number(b)
      : cell(a).textContent.localeCompare(cell(b).textContent, "en", {numeric: true})));
  for (const other of th.parentNode.cells) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  body.append(...rows);
}
document.addEventListener("click", sort);
document.addEventListener("keydown", sort);
""")

_TABLE = _TEMPLATES.from_string("""\
<div class="scroll"><table>
<thead><tr>{% for name in header %}
<th tabindex="0"{% if numeric[loop.index0] %} class="number"{% endif %}>{{ name }}</th>
{%- endfor %}</tr></thead>
<tbody>{% for row in rows %}
<tr>{% for text, number in row %}
<td{% if numeric[loop.index0] %} class="number"{% endif %}
{%- if number is not none %} data-number="{{ number }}"{% endif %}>{{ text }}</td>
{%- endfor %}</tr>
{% endfor %}</tbody>
</table></div>""")

_NUMBER = re.compile(r"([+-]?\d[\d,]*(?:\.\d+)?)|–( |$)")  # how the text of a number starts
_ABSOLUTE = ("http://", "https://")


@dataclass
class Section:
    """A section of a report.

    Attributes:
        title: its heading.
        blocks: results of :func:`text`, :func:`table`, :func:`preformatted`, :func:`figure` and
            :func:`side_by_side`.
    """

    title: str
    blocks: list[Markup] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """A table cell that is a link.

    Attributes:
        label: the visible text.
        href: target: a path relative to the page, or an http address.
    """

    label: str
    href: str


def text(paragraph: str) -> Markup:
    """A paragraph of plain text."""
    return Markup("<p>{}</p>").format(paragraph)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> Markup:
    """A table. Columns of numbers are aligned to the right; None becomes a dash.

    Args:
        header: names of the columns.
        rows: rows of the header's length; floats are shown with one decimal.

    Raises:
        ValueError: a row is shorter or longer than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the table has {len(header)} columns, but a row is {list(row)}")
    cells = [[_cell(value) for value in row] for row in rows]
    numeric = [all(_NUMBER.match(row[c][0]) for row in cells) for c in range(len(header))]
    return Markup(_TABLE.render(header=header, rows=cells, numeric=numeric))


def _cell(value: object) -> tuple[str, float | None]:
    """A cell's text, and the number that it is sorted by, if any."""
    if value is None:
        return "–", None
    if isinstance(value, Link):
        href = value.href if value.href.startswith(_ABSOLUTE) else quote(value.href)
        return Markup('<a href="{}">{}</a>').format(href, value.label), None
    if isinstance(value, Real) and not isinstance(value, Integral):
        return f"{value:.1f}", float(value)
    number = _NUMBER.match(str(value))
    return str(value), float(number[1].replace(",", "")) if number and number[1] else None


def preformatted(lines: Sequence[str]) -> Markup:
    """Lines of a log, unchanged."""
    return Markup('<pre class="scroll">{}</pre>').format("\n".join(lines))


def figure(picture: bytes | np.ndarray, caption: str = "", plot: bool = False) -> Markup:
    """A picture with its caption.

    Args:
        picture: PNG, or (H, W, 3) uint8 RGB.
        caption: plain text below the picture, also its alternative text.
        plot: the picture is a diagram, which :func:`side_by_side` scales to fit.
    """
    png = picture if isinstance(picture, bytes) else to_png(picture)
    data = base64.b64encode(png).decode("ascii")
    below = Markup("<figcaption>{}</figcaption>").format(caption) if caption else ""
    kind = Markup(' class="plot"') if plot else ""
    page = Markup('<figure{}><img alt="{}" src="data:image/png;base64,{}">{}</figure>')
    return page.format(kind, caption, data, below)


def side_by_side(figures: Sequence[Markup]) -> Markup:
    """Figures in one row, which wraps on a narrow screen."""
    return Markup('<div class="row">{}</div>').format(Markup("").join(figures))


def write_report(path: str, sections: Sequence[Section], title: str = "Report") -> None:
    """Write the page atomically.

    Args:
        path: the ``.html`` file; its folder is created.
        sections: in order.
        title: heading, and title of the browser tab.
    """
    if folder := os.path.dirname(path):
        PathManager.mkdirs(folder)
    write_text_atomic(path, _PAGE.render(title=title, sections=sections, script=_SORT))
