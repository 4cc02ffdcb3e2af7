"""The page is self-contained: numbers, pictures, nothing from elsewhere."""

import base64
import re
import shutil
import subprocess
from html.parser import HTMLParser

import cv2
import numpy as np
import pytest
from forked import LONG

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

CHROMIUM = shutil.which("chromium")


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
    assert not re.search(r"https?:|src=|href=|url\(|@import|<link|fetch|XMLHttp", bare)
    assert bare.count("<script>") == bare.count("<script") == 1
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
    assert '<td class="number" data-number="0.12345">0.1</td>' in table(["x"], [[0.12345]])
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


def test_addresses_are_links_and_other_schemes_are_not():
    links = [Link("a", "https://host/x/#/runs/1?a=b&c"), Link("b", "javascript:alert(1)")]
    page = Page(table(["page"], [[link] for link in links]))
    assert [a["href"] for a in page.all("a")] == [links[0].href, "javascript%3Aalert%281%29"]


ROWS = [
    ["b 10", 3.04, "12/100", "9.5 ± 0.2"],
    ["b 9", None, "", "– (chosen)"],
    ["A", -1.5, "1,200/2,000", "10.5 ± 0.2"],
    ["c", 3.01, "5/100", "+0.5"],
]


def test_numbers_are_sorted_by_their_value():
    cells = Page(table(["name", "AP", "done", "mean"], ROWS)).all("td")
    numbers = [cell.get("data-number") for cell in cells]
    assert numbers[1::4] == ["3.04", None, "-1.5", "3.01"]
    assert numbers[2::4] == ["12.0", None, "1200.0", "5.0"]
    assert numbers[3::4] == ["9.5", None, "10.5", "0.5"]
    assert numbers[0::4] == [None] * 4


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_a_click_on_a_header_sorts_the_table(tmp_path):
    orders = {
        "h[0].click()": "A b9 b10 c",
        "h[0].click(); h[0].click()": "c b10 b9 A",
        "h[1].click()": "b10 c A b9",
        "h[1].click(); h[1].click()": "A c b10 b9",
        "h[2].click()": "A b10 c b9",
        "h[2].click(); h[0].click()": "A b9 b10 c",
        "h[1].dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', bubbles: true}))": "b10 c "
        "A b9",
        "h[1].dispatchEvent(new KeyboardEvent('keydown', {key: 'Tab', bubbles: true}))": "b10 b9 "
        "A c",
    }
    tables = [table(["name", "AP", "done", "mean"], ROWS) for _ in orders]
    path = tmp_path / "report.html"
    write_report(str(path), [Section("Runs", tables)])
    clicks = "".join(
        f"{{ const h = document.querySelectorAll('table')[{i}].querySelectorAll('th'); {click}; }}"
        for i, click in enumerate(orders)
    )
    path.write_text(path.read_text().replace("</body>", f"<script>{clicks}</script></body>"))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", f"file://{path}"]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=LONG, check=True).stdout
    found = [
        " ".join(name.replace(" ", "") for name in re.findall(r"<tr>\s*<td>([^<]+)<", part))
        for part in dom.split("<table>")[1:]
    ]
    assert found == list(orders.values())
