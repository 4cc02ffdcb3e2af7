"""Lengths of pre-training, after 900 steps: the page agrees with the committed rows."""

import itertools
import statistics

from result_pages import LENGTHS, NAMES, ROOT, STEPS, section, steps_900, table, tuned

from region_pretrain.sweeps.intervals import pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

KEYS = {"box AP": "bbox/AP", "mask AP": "segm/AP"}
LABELS = {**NAMES, "point-level region contrast": "point"}
SHORT = {
    "mcl": "MCL", "point": "point-level", "ccop": "CCOP", "moco": "MoCo v2", "soco": "SoCo",
    "byol": "BYOL",
}  # fmt: skip
SUFFIXES = {"_quarter": 13_888, "": 55_552, "_four_times": 222_208}
ROWS = {row.init: row for row in read_csv(str(LENGTHS))}
APS = {init: row.values("bbox/AP") for init, row in ROWS.items()}


def page():
    return section("AP against images seen")


def mean(init, reference=None):
    values = pair(APS[init], APS[reference]) if reference else APS[init]
    return statistics.fmean(values.values())


def listed(values):
    """From the largest to the smallest, e.g. ``1.2 (MCL), 0.3 (CCOP) and -0.1 (BYOL)``."""
    *most, last = (
        f"{values[i]:.1f} ({SHORT[i]})" for i in sorted(values, key=lambda i: -values[i])
    )
    return f"{', '.join(most)} and {last}"


def test_tables(tmp_path):
    assert set(ROWS) == {"random"} | {f"{i}{s}" for i in SHORT for s in SUFFIXES}
    for caption, key in KEYS.items():
        lines = table(page(), caption, "13,888 images")[2:]
        assert len(lines) == 6
        for label, *cells in lines:
            for (suffix, seen), cell in zip(SUFFIXES.items(), cells, strict=True):
                row = ROWS[f"{LABELS[label]}{suffix}"]
                values = row.values(key)
                assert row.images_seen == seen
                assert [seeds[:2] for seeds in values] == [(7, 0), (7, 1)]
                assert cell == ", ".join(f"{value:.1f}" for value in values.values()), label
    lines = table(page(), "minutes of pre-training", "13,888 images")[2:]
    assert len(lines) == 6
    for label, *cells in lines:
        minutes = [ROWS[f"{LABELS[label]}{suffix}"].cost.minutes for suffix in SUFFIXES]
        assert cells == [f"{value:.1f}" for value in minutes], label
    # The usual length is that of the rows with 900 steps.
    protocol = ("steps900", 100)
    steps = {r.init: r for r in read_csv(str(STEPS)) if (r.finetune, r.labels) == protocol}
    for init in ("random", *NAMES.values()):
        of = steps[init].by_seeds
        assert all(of[seeds] == values for seeds, values in ROWS[init].by_seeds.items())
    _, *figures = write_tables(str(LENGTHS), ["random"], str(tmp_path))
    for kind, picture in (("images", "shapes_four_times"), ("minutes", "shapes_minutes")):
        assert any(f.endswith(f"shapes_four_times_{kind}_box_ap.png") for f in figures)
        assert (ROOT / f"docs/{picture}.png").stat().st_size > 10_000


def test_reading():
    text = " ".join(page().split())
    first, second = APS["random"].values()
    assert f"Random weights have {first:.1f} and {second:.1f} box AP." in text
    above = {i: list(pair(APS[f"{i}_quarter"], APS["random"]).values()) for i in SHORT}
    assert [i for i, values in above.items() if min(values) > 1] == ["byol"]
    assert [i for i, values in above.items() if max(values) < 0] == ["ccop", "moco"]
    assert min(above["point"]) < 0 < max(above["point"])
    rises = {i: mean(i, f"{i}_quarter") for i in SHORT}
    assert f"the mean box AP rises by {listed(rises)}; from all to four times" in text
    rises = {i: mean(f"{i}_four_times", i) for i in SHORT}
    assert f"as many, by {listed(rises)}." in text
    over = {i: mean(f"{i}_four_times", "random") for i in SHORT}
    assert f"mean differences from random weights are {listed(over)} box AP." in text
    for baseline in ("moco_four_times", "byol_four_times"):
        for init, key in itertools.product(("mcl", "point", "ccop"), KEYS.values()):
            values = ROWS[f"{init}_four_times"].values(key), ROWS[baseline].values(key)
            assert min(pair(*values).values()) > 0, (init, baseline, key)
        assert max(map(abs, pair(APS["soco_four_times"], APS[baseline]).values())) < 1


def test_equal_minutes():
    text, front = (" ".join(t.split()) for t in (page(), (ROOT / "README.md").read_text()))
    minutes = {init: row.cost.minutes for init, row in ROWS.items() if init != "random"}
    short = [init for init in minutes if minutes[init] < 20.5]
    ccop, mcl, moco, byol = (
        (mean(init), minutes[init])
        for init in ("ccop", "mcl", "moco_four_times", "byol_four_times")
    )
    assert sorted(short, key=mean)[-2:] == ["mcl", "ccop"]
    shown = "({:.1f} after {:.1f} minutes) and MCL's ({:.1f} after {:.1f}), but MoCo v2 has {:.1f} "
    shown += "after {:.1f} minutes and BYOL {:.1f} after {:.1f},"
    assert shown.format(*ccop, *mcl, *moco, *byol) in text
    faster = [
        statistics.fmean(value for seeds, value in tuned(init).items() if seeds[0] == 7)
        for init in ("byol_twice", "mcl_twice")
    ]
    assert "gives BYOL {:.1f} and MCL {:.1f} without more minutes".format(*faster) in text
    shown = "MCL ({:.1f} after {:.1f} minutes) and point-level contrast ({:.1f} after {:.1f})"
    longest = (("mcl_four_times", "point_four_times"), (mean, minutes.get))
    values = [of(init) for init, of in itertools.product(*longest)]
    assert shown.format(*values) in text
    baselines = [minutes[f"{init}_four_times"] for init in ("moco", "byol")]
    assert max(baselines) < min(minutes["mcl_four_times"], minutes["point_four_times"]) / 2
    times = [minutes[f"{init}_four_times"] / minutes[init] for init in SHORT]
    assert f"took {min(times):.1f} to {max(times):.1f} times the minutes of all images" in text
    shown = "CCOP has {:.1f} after {:.0f} minutes (the highest of its four pre-trainings), MoCo v2 "
    shown += "{:.1f} after {:.0f}, BYOL {:.1f} after {:.0f} and MCL {:.1f} after {:.0f}."
    assert shown.format(*ccop, *moco, *byol, *mcl) in front
    shown = "MCL ({:.1f} after {:.0f}) and point-level contrast ({:.1f} after {:.0f}), but hardly "
    shown += "SoCo ({:.1f} after {:.0f}) and not CCOP ({:.1f} after {:.0f});"
    others = [of(f"{i}_four_times") for i in ("soco", "ccop") for of in (mean, minutes.get)]
    assert shown.format(*values, *others) in front

    apart, highest = {}, {}
    for init in SHORT:
        found = {}
        for seeds, value in steps_900(init).items():
            found.setdefault(seeds[0], []).append(value)
        means = {seed: statistics.fmean(values) for seed, values in found.items()}
        apart[init] = max(means.values()) - min(means.values())
        highest[init] = max(means, key=means.get)
    least, most = min(apart, key=apart.get), max(apart, key=apart.get)
    assert (least, most, highest["ccop"]) == ("point", "ccop", 7)
    assert f"within {apart[least]:.1f} (point-level) to {apart[most]:.1f} (CCOP)." in text
