"""Emoji: the page agrees with the committed rows."""

import statistics

from result_pages import ROOT, section, table, tuned

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

NAMES = {
    "random weights": "random", "MoCo v2": "moco", "BYOL": "byol",
    "BYOL, learning rate x 2": "byol_twice", "SoCo": "soco", "CCOP": "ccop", "MCL": "mcl",
    "MCL, learning rate x 2": "mcl_twice", "point-level region contrast": "point",
}  # fmt: skip
CEILINGS = {
    "full supervision (boxes and masks of all scenes)": "full",
    "supervised MCL (labels of all scenes)": "supervised",
}
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
    ceilings = {init: found.pop(init) for init in CEILINGS.values()}
    assert list(found) == list(NAMES.values())
    for caption, key in zip(("box AP", "mask AP"), KEYS, strict=True):
        lines = table(page(), caption, "seed 2", "over random weights", "seed 3")[2:]
        assert [NAMES[label] for label, *_ in lines] == list(found)
        for label, *cells in lines:
            expected, values = [], found[NAMES[label]][key]
            pairs = pair(values, found["random"][key])
            for seed in (2, 3):
                mine = {s[1]: v for s, v in values.items() if s[0] in (seed, None)}
                assert list(mine) == [0, 1]
                expected.append(listed(mine.values()))
                above = [v for (pretrain, _), v in pairs.items() if pretrain == seed]
                expected.append(listed(above, "+.1f") or "–")
            assert cells == expected, label
    lines = table(page(), "900 steps", "box AP", "over random weights")[2:]
    assert [CEILINGS[label] for label, *_ in lines] == list(ceilings)
    for label, *cells in lines:
        expected = []
        for key in KEYS:
            values = ceilings[CEILINGS[label]][key]
            above = pair(values, found["random"][key]).values()
            expected += [listed(values.values()), listed(above, "+.1f")]
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
        if init != "random"
    }
    full, supervised = (statistics.fmean(pairs.pop(name)) for name in CEILINGS.values())
    assert {len(values) for values in pairs.values()} == {4}
    mean = {init: statistics.fmean(values) for init, values in pairs.items()}
    shown = {
        "mcl_twice": "MCL with twice its learning rate", "mcl": "MCL",
        "byol_twice": "BYOL with twice its learning rate", "point": "point-level", "ccop": "CCOP",
        "byol": "BYOL", "moco": "MoCo v2", "soco": "SoCo",
    }  # fmt: skip
    assert sorted(mean, key=mean.get, reverse=True) == list(shown)
    *most, last = (f"{mean[init]:+.1f} ({label})" for init, label in shown.items())
    assert f"random weights are {', '.join(most)} and {last} box AP." in text
    shown = "MCL with twice its rate brings half of what supervised MCL brings with the labels "
    shown += f"({supervised:+.1f}), and a sixth of "
    assert f"{shown}full supervision ({full:+.1f})." in text
    best = mean["mcl_twice"]
    assert round(supervised / best) == 2 and round(full / best) == 6
    above = {init: sum(value > 0 for value in values) for init, values in pairs.items()}
    assert above == {
        "mcl_twice": 4, "mcl": 4, "byol_twice": 4, "ccop": 4, "point": 3, "byol": 2, "moco": 0,
        "soco": 0,
    }  # fmt: skip
    by_run = [
        [v for seeds, v in of["bbox/AP"].items() if seeds[0] == seed]
        for of in found.values()
        for seed in (2, 3)
    ]
    apart = max(max(values) - min(values) for values in by_run if values)
    assert f"Fine-tunings of one pre-training differ by up to {apart:.1f} box AP" in text
    differences = (
        difference(pair(found[init]["bbox/AP"], found["random"]["bbox/AP"])) for init in pairs
    )
    widths = [d.high - d.low for d in differences]
    assert sum(width > 10 for width in widths) > len(widths) / 2
    both = pair(found["mcl_twice"]["bbox/AP"], found["byol_twice"]["bbox/AP"])
    assert difference(both).low < 0
    assert f"such as the {difference(both).mean:.1f} between MCL and BYOL" in text
    shown = (
        "MCL is {:.1f} box AP above random weights, BYOL {:.1f}, point-level contrast {:.1f} and "
    )
    four = (mean[init] for init in ("mcl_twice", "byol_twice", "point", "ccop"))
    assert f"{shown}CCOP {{:.1f}}".format(*four) in front
    assert f"MoCo v2 is {-mean['moco']:.1f} and SoCo {-mean['soco']:.1f} below" in front
    assert "most 95 % intervals are wider than ten points" in front
    shapes = {
        init: difference(pair(tuned(init), tuned("random"))).mean
        for init in ("mcl_twice", "soco", "ccop")
    }
    assert max(shapes, key=shapes.get) == "mcl_twice"
    assert f"and {shapes['soco']:.1f} above on Shapes with 900 steps" in text
    assert f"CCOP, which is {shapes['ccop']:.1f} above there and {mean['ccop']:.1f} with" in text


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
