"""Four times the pre-training: the page agrees with the committed rows."""

import itertools
import statistics

from result_pages import NAMES, ROOT, STEPS, section, steps_900, table

from region_pretrain.sweeps.intervals import pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

ROWS = ROOT / "docs/results/shapes_four_times.csv"
KEYS = "bbox/AP", "segm/AP"
LABELS = {**NAMES, "point-level region contrast": "point"}


def listed(values, form=".1f"):
    return ", ".join(f"{value:{form}}" for value in values)


def page():
    return section("Four times the images")


def test_table(tmp_path):
    rows = {row.init: row for row in read_csv(str(ROWS))}
    lines = table(page(), "box AP", "55,552 images")[2:]
    assert len(lines) == 6
    for label, *cells in lines:
        once, longer = (rows[f"{LABELS[label]}{suffix}"] for suffix in ("", "_four_times"))
        assert (once.images_seen, longer.images_seen) == (55_552, 222_208)
        expected = []
        for key in KEYS:
            values = once.values(key), longer.values(key)
            assert [seeds[:2] for seeds in values[0]] == [(7, 0), (7, 1)]
            expected += [listed(of.values()) for of in values]
            expected.append(listed(pair(values[1], values[0]).values(), "+.1f"))
        assert cells == expected, label
    # The usual length is that of the rows with 900 steps.
    protocol = ("steps900", 100)
    steps = {r.init: r for r in read_csv(str(STEPS)) if (r.finetune, r.labels) == protocol}
    for init in ("random", *NAMES.values()):
        of = steps[init].by_seeds
        assert all(of[seeds] == values for seeds, values in rows[init].by_seeds.items())
    _, *figures = write_tables(str(ROWS), ["random"], str(tmp_path))
    assert any(figure.endswith("shapes_four_times_images_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_four_times.png").stat().st_size > 10_000


def test_reading():
    both = {row.init: row for row in read_csv(str(ROWS))}
    rows = {init: row.values("bbox/AP") for init, row in both.items()}
    text, front = (" ".join(t.split()) for t in (page(), (ROOT / "README.md").read_text()))

    def above(init, reference):
        return list(pair(rows[f"{init}_four_times"], rows[reference]).values())

    mean = {init: statistics.fmean(above(init, "random")) for init in NAMES.values()}
    order = ["mcl", "point", "ccop", "moco", "soco", "byol"]
    assert sorted(mean, key=mean.get, reverse=True) == order
    shown = "{:.1f} (MCL), {:.1f} (point-level), {:.1f} (CCOP), {:.1f} (MoCo v2), {:.1f} (SoCo)"
    values = [mean[init] for init in order]
    assert f"{shown} and {{:.1f}} (BYOL) box AP".format(*values) in text
    shown = (
        "MCL is {:.1f} box AP above random weights, point-level contrast {:.1f}, CCOP {:.1f}, "
        "MoCo v2 {:.1f}, SoCo {:.1f} and BYOL {:.1f}."
    )
    assert shown.format(*values) in front
    assert (
        f"random weights have {' and '.join(f'{v:.1f}' for v in rows['random'].values())}" in text
    )

    gains = {init: above(init, init) for init in mean}
    gain = {init: statistics.fmean(values) for init, values in gains.items()}
    shown = (
        "MCL gains {mcl:.1f} by the length, MoCo v2 {moco:.1f}, point-level contrast {point:.1f}"
    )
    assert shown.format(**gain) in text
    assert f"BYOL {gain['byol']:.1f} and SoCo {gain['soco']:.1f}, with one pair of either" in text
    assert min(gains["soco"]) < 0 < max(gains["soco"]) and max(gains["ccop"]) < 0
    assert f"CCOP loses {-gain['ccop']:.1f}," in text
    for baseline in ("moco_four_times", "byol_four_times"):
        for init, key in itertools.product(("mcl", "point", "ccop"), KEYS):
            values = both[f"{init}_four_times"].values(key), both[baseline].values(key)
            assert min(pair(*values).values()) > 0, (init, baseline, key)
        assert max(map(abs, above("soco", baseline))) < 1

    usual = steps_900("mcl_twice", seeds=(7,)), steps_900("mcl", seeds=(7,))
    twice = statistics.fmean(pair(*usual).values())
    assert f"gives this pre-training of MCL {twice:.1f} at the usual length" in text
    apart, highest = {}, {}
    for init in mean:
        found = {}
        for seeds, value in steps_900(init).items():
            found.setdefault(seeds[0], []).append(value)
        means = {seed: statistics.fmean(values) for seed, values in found.items()}
        apart[init], highest[init] = max(means.values()) - min(means.values()), max(
            means, key=means.get
        )
    least, most = min(apart, key=apart.get), max(apart, key=apart.get)
    assert (least, most, highest["ccop"]) == ("point", "ccop", 7)
    assert f"within {apart[least]:.1f} (point-level) to {apart[most]:.1f} (CCOP, of which" in text
