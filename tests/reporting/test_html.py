"""The page is self-contained: numbers, pictures, nothing from elsewhere."""

import base64
import re
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest

from region_pretrain.reporting.html import (
    Link,
    Section,
    figure,
    preformatted,
    side_by_side,
    table,
    text,
    write_report,
)
from region_pretrain.reporting.plots import plot_curves


class Page(HTMLParser):
    """Text by tag, attributes, and whether every tag is closed."""

    VOID = {"meta", "img"}

    def __init__(self, page: str):
        super().__init__()
        self.open, self.texts, self.tags = [], {}, []
        self.feed(page)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and data.strip():
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3)).astype(np.uint8)


@pytest.fixture
def page(tmp_path, picture):
    curve = plot_curves({"a": ([1, 2], [3, 4])}, "iteration", "loss")
    rows = [["scratch", 21.34, 100, None], ["pre-trained <ours>", np.float32(25.5), 200, "yes"]]
    sections = [
        Section("AP & labels", [text("5 < 10"), table(["init", "AP", "images", "note"], rows)]),
        Section("Curves", [figure(curve, 'the "loss"', plot=True)]),
        Section(
            "Pictures",
            [
                side_by_side([figure(picture, name) for name in ("truth", "A", "B <b>")]),
                preformatted(["a < b", "  c"]),
            ],
        ),
    ]
    path = tmp_path / "new" / "report.html"
    write_report(str(path), sections, title="Shapes <report>")
    return path.read_text(encoding="utf-8")


def test_text_and_tables(page):
    parsed = Page(page)
    assert parsed.texts["title"] == parsed.texts["h1"] == ["Shapes <report>"]
    assert parsed.texts["h2"] == ["AP & labels", "Curves", "Pictures"]
    assert parsed.texts["p"] == ["5 < 10"]
    assert parsed.texts["th"] == ["init", "AP", "images", "note"]
    expected = ["scratch", "21.3", "100", "–", "pre-trained <ours>", "25.5", "200", "yes"]
    assert parsed.texts["td"] == expected
    assert [a.get("class") for a in parsed.all("td")] == [None, "number", "number", None] * 2


def test_pictures_are_inside_and_decodable(page, picture):
    images = Page(page).all("img")
    assert [a["alt"] for a in images] == ['the "loss"', "truth", "A", "B <b>"]
    decoded = []
    for attrs in images:
        kind, data = attrs["src"].split(",")
        assert kind == "data:image/png;base64"
        data = np.frombuffer(base64.b64decode(data, validate=True), np.uint8)
        decoded.append(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])
    assert decoded[0].shape == (600, 960, 3)
    assert all((d == picture).all() for d in decoded[1:])
    parsed = Page(page)
    assert parsed.texts["figcaption"] == [a["alt"] for a in images]
    assert [a.get("class") for a in parsed.all("figure")] == ["plot", None, None, None]
    assert len([a for a in parsed.all("div") if a.get("class") == "row"]) == 1
    assert parsed.texts["pre"] == ["a < b\n  c"]


def test_nothing_comes_from_elsewhere_and_phones_are_thought_of(page):
    bare = re.sub(r'src="data:[^"]*"', "", page)
    assert not re.search(r"https?:|src=|href=|url\(|@import|<script|<link", bare)
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in Page(page).all(
        "meta"
    )
    assert "max-width: 100%" in bare and "overflow-x: auto" in bare


def test_a_report_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "report.html"
    write_report(str(path), [Section("old")])
    write_report(str(path), [Section("new", [text("x")])])
    assert "new" in path.read_text() and "old" not in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_uneven_rows_are_errors():
    with pytest.raises(ValueError, match="2 columns"):
        table(["a", "b"], [[1, 2], [1]])


def test_digits_and_empty_tables():
    assert '<td class="number">0.123</td>' in table(["x"], [[0.12345]], digits=3)
    assert "<td>True</td>" in table(["x"], [[True]])
    assert Page(table(["only", "header"], [])).texts["th"] == ["only", "header"]


def test_columns_of_numbers_as_text_are_aligned_and_links_quoted():
    page = Page(
        table(
            ["AP", "difference", "name"],
            [["1.0 ± 0.2", "+0.5", Link("run <1>", "runs/a b")], ["– (chosen)", "-1.0", "–x"]],
        )
    )
    assert [a.get("class") for a in page.all("th")] == ["number", "number", None]
    assert page.all("a") == [{"href": "runs/a%20b"}] and page.texts["a"] == ["run <1>"]
