"""Fine-tunings after pre-training with chosen learning rates: pages and rows agree."""

import itertools
import statistics

import pytest
from result_pages import (
    ROOT,
    TUNED,
    difference_cells,
    run_cells,
    section,
    steps_900,
    table,
    tuned,
)

from region_pretrain.config import load_config
from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

NAMES = {
    "random weights": "random", "MoCo v2": "moco", "BYOL, learning rate x 2": "byol_twice",
    "SoCo": "soco", "CCOP": "ccop", "MCL, learning rate x 2": "mcl_twice",
    "point-level region contrast": "point",
}  # fmt: skip
REGIONAL = ("mcl_twice", "ccop", "point", "soco")
TWICE = {"byol_twice": "byol", "mcl_twice": "mcl"}
REFERENCES = ("random", "moco", "byol_twice")
TASKS = {"box AP": "bbox/AP", "mask AP": "segm/AP"}


def page():
    return section("Chosen learning rates")


def to(init, reference, key="bbox/AP"):
    return pair(tuned(init, key), tuned(reference, key))


def test_tables(tmp_path):
    rows = read_csv(str(TUNED))
    assert {machine for row in rows for *_, machine in row.by_seeds} == {
        "AMD EPYC, AVX512, PyTorch 2.15.0"
    }
    assert {(row.finetune, row.labels) for row in rows} == {("steps900", 100)}
    for task, key in TASKS.items():
        lines = table(page(), task, "chosen rate, seed 4")[2:]
        assert [NAMES[label] for label, *_ in lines] == [row.init for row in rows]
        for label, *cells in lines:
            expected = run_cells(tuned(NAMES[label], key), (4, 5, 6, 7), lambda _: "EPYC")
            assert cells == expected, label
        lines = table(page(), f"{task}, chosen rate", "over random weights")[2:]
        assert [label for label, *_ in lines] == [*NAMES][1:]
        references = [tuned(init, key) for init in REFERENCES]
        for label, *cells in lines:
            assert cells == difference_cells(tuned(NAMES[label], key), references), label
    _, *figures = write_tables(str(TUNED), ["random"], str(tmp_path))
    assert any(figure.endswith("shapes_tuned_runs_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_tuned.png").stat().st_size > 10_000


@pytest.mark.parametrize("path", ["docs/benchmark.md", "README.md"])
def test_reading(path):
    text = page() if path.startswith("docs") else (ROOT / path).read_text()
    text = " ".join(text.split())
    box, mask = (
        {init: difference(to(init, "byol_twice", key)) for init in REGIONAL}
        for key in TASKS.values()
    )
    for key in TASKS.values():
        for init, reference in itertools.product(REGIONAL, ("random", "moco")):
            assert min(to(init, reference, key).values()) > 0, (init, reference, key)
        for init in set(NAMES.values()) - {"mcl_twice"}:
            assert min(to("mcl_twice", init, key).values()) > 0, (init, key)
    mcl = box["mcl_twice"], mask["mcl_twice"]
    assert min(d.low for d in mcl) > 0 and len(to("mcl_twice", "byol_twice")) == 8
    both = f" and {mcl[1].mean:.1f} mask AP" if path != "README.md" else ""
    assert f"on average {mcl[0].mean:.1f} box AP{both} above BYOL, higher in all 8 pairs" in text
    assert box["ccop"].low < 0 < box["ccop"].high and mask["ccop"].low < 0 < mask["ccop"].high
    means = [box[init].mean for init in ("ccop", "point", "soco")]
    assert all(box[init].low < box[init].mean < 0 < box[init].high for init in ("point", "soco"))
    shown = "({:+.1f} box AP); point-level contrast ({:+.1f}) and SoCo ({:+.1f}) are lower, though "
    shown += "their intervals include 0."
    assert shown.format(*means) in text
    gains = {init: pair(tuned(init), steps_900(own)) for init, own in TWICE.items()}
    means = [difference(gains[init]).mean for init in TWICE]
    if path == "README.md":
        settings = load_config(str(ROOT / "configs/sweeps/shapes_settings.py")).sweep.pretrain
        assert all("optimizer.lr=8" in settings[init].overrides for init in TWICE)
        assert "(8.0 for batch size 256, against 1.0 of MCL's and 0.45 of BYOL's" in text
        assert f"BYOL gains {means[0]:.1f} box AP by twice its own" in text
        return
    assert "over MoCo v2, of two pre-trainings here, are wide and include 0 in box AP." in text
    assert all(difference(to(init, "moco")).low < 0 for init in REGIONAL)
    one = [statistics.fmean(v for k, v in gains[i].items() if k[0] == 7) for i in TWICE]
    shown = (
        "twice its own gives BYOL {:.1f} box AP and MCL {:.1f} in pairs of equal seeds, most of "
    )
    shown += "them of two processors, and {:.1f} and {:.1f} on one (seed 7)."
    assert shown.format(*means, *one) in text


def test_other_processor():
    """The same pre-training and fine-tuning seeds on two processors."""
    apart = {}
    for init in ("soco", "ccop", "point", "moco"):
        xeon = {k[:2]: v for k, v in steps_900(init).items() if k[0] is not None and "Xeon" in k[2]}
        both = [
            abs(v - xeon[k[:2]])
            for k, v in tuned(init).items()
            if k[0] is not None and k[:2] in xeon
        ]
        apart[init] = both
    most = max(max(both) for both in apart.values())
    mean = statistics.fmean(v for both in apart.values() for v in both)
    text = " ".join(section("Settings of the Shapes configs").split())
    assert f"differ by {mean:.1f} on average and by up to {most:.1f}" in text
