"""The report: one HTML page that holds all its pictures and opens anywhere, also on a phone."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from urllib.parse import quote

import numpy as np
from detectron2.utils.file_io import PathManager

from region_pretrain.files import write_text_atomic
from region_pretrain.reporting.plots import to_png

_STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.25; }
h2 { font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #8886; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #8884; text-align: left; }
td:not(:first-child) { white-space: nowrap; }
th { border-bottom: 2px solid #8888; white-space: nowrap; }
.number { text-align: right; }
figure { margin: .5rem 0; }
figcaption { font-size: .85rem; opacity: .8; }
img { max-width: 100%; height: auto; display: block; }
.grid { display: grid; gap: .5rem; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); }
""".strip()


@dataclass
class Section:
    """A part of the report.

    Attributes:
        title: its heading.
        blocks: HTML from :func:`text`, :func:`table`, :func:`preformatted`, :func:`figure` and
            :func:`picture_grid`.
    """

    title: str
    blocks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Link:
    """A cell of a table that leads elsewhere.

    Attributes:
        label: what is read.
        href: relative to the page, or absolute.
    """

    label: str
    href: str


def text(paragraph: str) -> str:
    """A paragraph of plain text."""
    return f"<p>{html.escape(paragraph)}</p>"


def table(header: Sequence[str], rows: Sequence[Sequence[object]], digits: int = 1) -> str:
    """A table. Columns of numbers are aligned to the right; None is a dash.

    Args:
        header: names of the columns.
        rows: as long as the header each.
        digits: decimals of floats.

    Raises:
        ValueError: a row is shorter or longer than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"the table has {len(header)} columns, but a row is {list(row)}")
    cells = [[_shown(value, digits) for value in row] for row in rows]
    kinds = [
        ' class="number"' if all(_is_number(row[c]) or row[c] is None for row in rows) else ""
        for c in range(len(header))
    ]

    def line(tag: str, row: Sequence[str]) -> str:
        filled = zip(kinds, row, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{x}</{tag}>" for kind, x in filled) + "</tr>\n"

    head = line("th", [html.escape(name) for name in header])
    body = "".join(line("td", row) for row in cells)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>\n{body}</tbody></table></div>'


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _shown(value: object, digits: int) -> str:
    if value is None:
        return "–"
    if isinstance(value, Link):
        return f'<a href="{html.escape(quote(value.href))}">{html.escape(value.label)}</a>'
    if _is_number(value) and not isinstance(value, Integral):
        return f"{value:.{digits}f}"
    return html.escape(str(value))


def preformatted(lines: Sequence[str]) -> str:
    """Lines of a log, as they are."""
    return f'<pre class="scroll">{html.escape(chr(10).join(lines))}</pre>'


def figure(picture: bytes | np.ndarray, caption: str = "") -> str:
    """A picture with its caption.

    Args:
        picture: PNG, or (H, W, 3) uint8 RGB.
        caption: plain text below it, also read to people who do not see it.
    """
    png = picture if isinstance(picture, bytes) else to_png(picture)
    data = base64.b64encode(png).decode("ascii")
    said = html.escape(caption)
    below = f"<figcaption>{said}</figcaption>" if caption else ""
    return f'<figure><img alt="{said}" src="data:image/png;base64,{data}">{below}</figure>'


def picture_grid(
    header: Sequence[str], rows: Sequence[Sequence[bytes | np.ndarray]], captions: bool = True
) -> str:
    """Pictures side by side, below one another where the screen is narrow.

    Args:
        header: what each column shows, e.g. ground truth, scratch, pre-trained.
        rows: pictures as for :func:`figure`, as many as the header has names.
        captions: write the column's name below every picture.

    Raises:
        ValueError: a row is shorter or longer than the header.
    """
    lines = []
    for row in rows:
        if len(row) != len(header):
            raise ValueError(
                f"the grid has {len(header)} columns, but a row of {len(row)} pictures"
            )
        named = zip(row, header, strict=True)
        pictures = "".join(figure(p, name if captions else "") for p, name in named)
        lines.append(f'<div class="grid">{pictures}</div>')
    return "\n".join(lines)


def write_report(
    path: str, sections: Sequence[Section], title: str = "Report", width: str = "60rem"
) -> None:
    """Write the page; a reader sees either the old one or the whole new one.

    Args:
        path: of the ``.html`` file; its folder is made.
        sections: in order.
        title: heading, and name of the browser's tab.
        width: of the text where the screen is wider, in CSS's words.
    """
    style = f"{_STYLE}\nbody {{ max-width: {width}; }}"
    body = "\n".join(
        f"<section>\n<h2>{html.escape(s.title)}</h2>\n" + "\n".join(s.blocks) + "\n</section>"
        for s in sections
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>\n{style}\n</style>\n</head>\n"
        f"<body>\n<h1>{html.escape(title)}</h1>\n{body}\n</body>\n</html>\n"
    )
    if folder := os.path.dirname(path):
        PathManager.mkdirs(folder)
    write_text_atomic(path, page)
