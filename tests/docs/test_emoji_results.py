"""Emoji: the page agrees with the committed rows."""

import statistics

from result_pages import ROOT, section, steps_900, table

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

NAMES = {
    "random weights": "random", "MoCo v2": "moco", "BYOL": "byol",
    "BYOL, learning rate x 2": "byol_twice", "SoCo": "soco", "CCOP": "ccop", "MCL": "mcl",
    "MCL, learning rate x 2": "mcl_twice", "point-level region contrast": "point",
}  # fmt: skip
KEYS = "bbox/AP", "segm/AP"


def page():
    return section("Emoji")


def rows(name):
    found = read_csv(str(ROOT / f"docs/results/{name}.csv"))
    return {row.init: {key: row.values(key) for key in KEYS} for row in found}


def listed(values, form=".1f"):
    return ", ".join(f"{value:{form}}" for value in values)


def test_tables(tmp_path):
    found = rows("emoji_steps")
    lines = table(page(), "initialisation", "box AP", "over random weights")[2:]
    assert [NAMES[label] for label, *_ in lines] == list(found) == list(NAMES.values())
    for label, *cells in lines:
        expected = []
        for key in KEYS:
            values = found[NAMES[label]][key]
            assert [seeds[1] for seeds in values] == [0, 1]
            expected.append(listed(values.values()))
            pairs = pair(values, found["random"][key]).values()
            expected.append("–" if label == "random weights" else listed(pairs, "+.1f"))
        assert cells == expected, label
    short = rows("emoji_long")
    lines = table(page(), "300 steps", "box AP")[2:]
    assert [NAMES[label] for label, *_ in lines] == list(short)
    for label, *cells in lines:
        assert cells == [listed(short[NAMES[label]][key].values()) for key in KEYS]
    path = str(ROOT / "docs/results/emoji_steps.csv")
    _, *figures = write_tables(path, ["random"], str(tmp_path))
    assert any(figure.endswith("emoji_steps_runs_box_ap.png") for figure in figures)
    assert (ROOT / "docs/emoji_steps.png").stat().st_size > 10_000


def test_reading():
    text, found = " ".join(page().split()), rows("emoji_steps")
    front = " ".join((ROOT / "README.md").read_text().split())
    pairs = {
        init: pair(values["bbox/AP"], found["random"]["bbox/AP"]).values()
        for init, values in found.items()
    }
    mean = {init: statistics.fmean(values) for init, values in pairs.items()}
    above = "mcl", "mcl_twice", "point", "byol_twice", "ccop"
    assert all(min(pairs[init]) > 0 for init in above)
    shown = (
        "MCL is {:.1f} box AP above random weights on average with its own learning rate and "
        "{:.1f} with twice that, point-level region contrast {:.1f}, BYOL with twice its learning "
        "rate {:.1f} and CCOP {:.1f}, each in both pairs."
    )
    assert shown.format(*(mean[init] for init in above)) in text
    assert min(pairs["byol"]) < 0 < max(pairs["byol"])
    assert max(*pairs["moco"], *pairs["soco"]) < 0
    assert f"by {-mean['moco']:.1f} and {-mean['soco']:.1f} on average." in text
    shown = "MCL is {:.1f} box AP above random weights, point-level contrast {:.1f} and BYOL"
    assert shown.format(mean["mcl_twice"], mean["point"]) in front
    assert f"{mean['byol_twice']:.1f}, and SoCo {-mean['soco']:.1f} below" in front
    values = [list(of["bbox/AP"].values()) for of in found.values()]
    apart = max(max(of) - min(of) for of in values)
    assert f"Fine-tunings of one pre-training differ by up to {apart:.1f} box AP" in text
    shapes = {
        init: difference(pair(steps_900(init), steps_900("random"))).mean
        for init in ("mcl_twice", "soco", "ccop")
    }
    assert max(mean, key=mean.get) == "mcl_twice"
    assert f"and {shapes['soco']:.1f} above on Shapes with 900 steps" in text
    assert f"CCOP, which is {shapes['ccop']:.1f} above there" in text


def test_reading_of_300_steps():
    text, found = " ".join(page().split()), rows("emoji_long")

    def above(init, key, seed=0):
        (value,) = (
            v
            for seeds, v in pair(found[init][key], found["random"][key]).items()
            if seeds[1] == seed
        )
        return value

    best = ("mcl", "point", "ccop")
    box, mask = ([f"{above(init, key):.1f}" for init in best] for key in KEYS)
    assert "are {}, {} and {} box AP above random".format(*box) in text
    assert "and {}, {} and {} in mask AP".format(*mask) in text
    assert all(above(init, "bbox/AP") < 0 for init in ("moco", "byol", "soco"))
    ccop, soco = above("ccop", "bbox/AP", 1), -above("soco", "bbox/AP", 1)
    first = -above("soco", "bbox/AP")
    assert f"CCOP is {ccop:.1f} above and SoCo {soco:.1f} below, after {first:.1f} with" in text
