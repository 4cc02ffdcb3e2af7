"""The other pages with numbers agree with their committed rows."""

import csv
import itertools
import statistics
from pathlib import Path

import pytest
from result_pages import CHOSEN, CSV, NAMES, ROOT, section, steps_900, table
from scipy.stats import spearmanr

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

SETTINGS = ROOT / "docs/results/shapes_settings.csv"
LABELS = ROOT / "docs/results/shapes_labels.csv"
LENGTHS = ROOT / "docs/results/shapes_lengths.csv"
BYOL_TWICE = "BYOL, learning rate x 2"


def words(path):
    return " ".join((ROOT / path).read_text().split())


def probes():
    with open(ROOT / "docs/results/shapes_probes.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_hours_on_a_gpu():
    """Images x epochs, divided by the measured images per second."""
    speed = table((ROOT / "docs/gpu.md").read_text(), "recipe", "images per step")[2:]
    rates = {line[0].partition(",")[0]: float(line[2].replace(",", "")) for line in speed}
    page = (ROOT / "docs/own_data.md").read_text()
    (_, *header), _, *lines = table(page, "images seen", "BYOL")
    assert len(header) == 6 and len(lines) == 2
    for million, *hours in lines:
        images = float(million.split()[0]) * 1e6
        for name, value in zip(header, hours, strict=True):
            rate = rates[name[0].upper() + name[1:]]
            assert value == f"{images / rate / 3600:.1f}", (million, name)
    eight = dict(zip(header, lines[0][1:], strict=True))
    assert f"for about 10,000 images, {eight['MCL']} hours on one H200" in words("README.md")


def test_page_of_the_probes():
    lines, page = probes(), (ROOT / "docs/probes.md").read_text()
    names = {"kNN": "knn", "linear": "linear", "found again": "retrieval"}
    names["variance within images"] = "variance_within"
    levels = {"box head": "head", "FPN": "fpn", "trunk": "trunk"}
    shown = table(page, "probe", "level")[2:]
    assert len(lines) == 18 and len(shown) == 13
    aps = [float(line["ap"]) for line in lines]
    for name, level, rho, seconds in shown:
        key = f"{names[name]}_{levels[level]}" if name in names else "frozen_trunk"
        values = [float(line[key]) for line in lines]
        assert float(rho) == pytest.approx(spearmanr(values, aps).statistic, abs=0.00501)
        costs = [float(line[f"{key}_seconds"]) for line in lines]
        assert float(seconds) == pytest.approx(sum(costs) / 18, abs=0.501)


def test_lengths_of_pre_training(tmp_path):
    rows = {row.init: row for row in read_csv(str(LENGTHS))}
    page = section("AP against images seen")
    header, _, *lines = table(page, "images seen", "random weights")
    names = {**NAMES, "point-level region contrast": "point"}
    suffixes = {"3,488": "_sixteenth", "13,888": "_quarter", "55,552": ""}
    assert [line[0] for line in lines] == list(suffixes) and len(header) == 8
    means = {}
    for seen, *cells in lines:
        for label, cell in zip(header[1:], cells, strict=True):
            init = names[label] + suffixes[seen] if label in names else "random"
            values = [value for _, value in sorted(rows[init].values("bbox/AP").items())]
            means[label, seen] = statistics.fmean(values)
            shown = ", ".join(f"{value:.1f}" for value in values)
            if len(values) > 2:
                shown = f"{means[label, seen]:.1f} ± {statistics.stdev(values):.1f}"
            assert cell == shown, (label, seen)
    for row in read_csv(str(CSV)):
        if row.init in rows:
            assert row.by_seeds == rows[row.init].by_seeds
    for line in probes():
        if line["initialisation"].endswith("_quarter"):
            (found,) = (
                v for k, v in rows[line["initialisation"]].values("bbox/AP").items() if k[0] == 0
            )
            assert found == float(line["ap"])
    _, *figures = write_tables(str(LENGTHS), ["random"], str(tmp_path))
    assert any(figure.endswith("_images_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_images.png").stat().st_size > 10_000
    text = " ".join(page.split())
    rises, fall, above = {}, {}, {}
    random = rows["random"].statistics("bbox/AP")
    for label in header[2:]:
        values, key = rows[names[label]].values("bbox/AP"), names[label]
        pairs = pair(values, rows[f"{key}_quarter"].values("bbox/AP"))
        assert len(pairs) == 2
        rises[label] = statistics.fmean(pairs.values())
        fall[label] = [f"{value:.1f}" for value in pairs.values() if value < 0]
        above[label] = means[label, "3,488"] - random["mean"]
    assert {label: values for label, values in fall.items() if values} == {
        "MoCo v2": ["-0.5"],
        "SoCo": ["-0.9"],
    }
    assert (min(rises, key=rises.get), max(rises, key=rises.get)) == ("SoCo", "MCL")
    shown = f"{min(rises.values()):.1f} (SoCo) to {max(rises.values()):.1f} (MCL)"
    assert f"rise by {shown} on average" in text
    short = {label: label.removesuffix(" region contrast") for label in above}
    *most, last = (f"{above[i]:.1f} ({short[i]})" for i in sorted(above, key=lambda i: -above[i]))
    assert f"single runs are {', '.join(most)} and {last} from the mean of random" in text
    assert f"whose standard deviation is {random['std']:.1f}:" in text
    quarter = rows["soco_quarter"].values("bbox/AP").values()
    assert f"differ by up to {max(quarter) - min(quarter):.1f} (SoCo)" in text


def test_equal_minutes():
    """A quarter of the images for the region methods, all images for the baselines."""
    long = {row.init: row for row in read_csv(str(CSV))}
    quarters = {row.init: row.values("bbox/AP") for row in read_csv(str(LENGTHS))}
    page = section("AP against images seen")
    lines = table(page, "quarter of the images", "minutes")[2:]
    names = {**NAMES, "point-level region contrast": "point"}
    assert [names[label] for label, *_ in lines] == ["soco", "ccop", "mcl", "point"]
    for label, *cells in lines:
        init = names[label]
        expected = [f"{long[init].cost.minutes / 4:.1f}"]
        for reference in ("random", "moco", "byol"):
            pairs = pair(quarters[f"{init}_quarter"], long[reference].values("bbox/AP"))
            assert [seeds[0] for seeds in pairs] == [0, 2]
            assert reference == "byol" or min(pairs.values()) > 0
            expected.append(", ".join(f"{value:+.1f}" for value in pairs.values()))
        assert cells == expected, label
        assert (cells[3].count("+") == 2) == (init == "soco")
    minutes = [f"{long[init].cost.minutes:.1f}" for init in ("moco", "byol", "point", "ccop")]
    minutes += [f"{long[init].cost.minutes:.1f}" for init in ("soco", "mcl")]
    text = "cost MoCo v2 {} minutes, BYOL {}, point-level {}, CCOP {}, SoCo {} and MCL {} ("
    assert text.format(*minutes) in " ".join(page.split())


def test_labels(tmp_path):
    path, *figures = write_tables(str(LABELS), ["random"], str(tmp_path))
    made = Path(path).read_text()
    page = section("AP against labels")
    for caption in ("box AP", "mask AP"):
        shown = table(page[page.index(f"labelled scenes, {caption}") :], "initialisation")
        assert shown == table(made[made.index(f"labelled images: {caption}") :], "initialisation")
    worth = table(page[page.index("weights would need for the same box AP") :], "initialisation")
    assert worth == table(made[made.index("would need for the same box AP") :], "initialisation")
    assert (ROOT / "docs/shapes_labels.png").stat().st_size > 10_000
    assert any(figure.endswith("_labels_box_ap.png") for figure in figures)
    rows = read_csv(str(LABELS))
    assert {len(row.by_seeds) for row in rows} == {2} and len(rows) == 18
    values = {(row.init, row.labels): row.values("bbox/AP") for row in rows}
    for better, worse in (("mcl_twice", "byol_twice"), ("byol_twice", "random")):
        for n in (25, 50, 100, 200, 400, 1000):
            pairs = pair(values[better, n], values[worse, n])
            assert len(pairs) == 2 and min(pairs.values()) > 0
    apart = {at: max(of.values()) - min(of.values()) for at, of in values.items()}
    few = max(spread for (_, n), spread in apart.items() if n <= 200)
    assert few == max(apart.values())
    aps = {(row.init, row.labels): row.statistics("bbox/AP")["mean"] for row in rows}
    gains = {
        init: [f"{aps[init, n] - aps['random', n]:.1f}" for n in (25, 50, 100, 200, 400, 1000)]
        for init in ("mcl_twice", "byol_twice")
    }
    text, front = (" ".join(p.split()) for p in (page, (ROOT / "README.md").read_text()))
    assert (
        f"With 25 to 200 scenes, the two runs of an initialisation differ by up to {few:.1f}"
        in text
    )
    mcl, byol = gains.values()
    least, most = (f(mcl[:4], key=float) for f in (min, max))
    shown = f"on 25 to 200 scenes it is {least} to {most} box AP above random weights, on 400 "
    shown += f"{mcl[4]} and on 1,000 {mcl[5]}; BYOL gains most on 50 ({byol[1]}), {byol[0]} on 25 "
    assert f"{shown}and {byol[5]} on 1,000." in text
    assert max(byol, key=float) == byol[1] and sorted(mcl, key=float) == mcl[::-1]
    times = [
        [float(cell.split("(")[1].split()[0]) for cell in cells if ">" not in cell]
        for _, *cells in worth[2:]
    ]
    byol, mcl = times
    assert f"is worth about {mcl[0]} times the labels on 25 to 100 scenes." in text
    assert max(abs(mcl[0] - ratio) for ratio in mcl[:3]) <= 0.11
    rise = aps["random", 1000] - aps["random", 400]
    shown = f"On 200 it reaches {aps['mcl_twice', 200]:.1f} box AP, and random weights "
    shown += f"{aps['random', 1000]:.1f} on 1,000; the ratio there, {mcl[3]}, is loose, as random "
    assert f"{shown}weights rise by only {rise:.1f} from 400 to 1,000." in text
    shown = f"worth about {mcl[0]} times the labels on 25 to 100 images, with BYOL "
    assert f"{shown}{min(byol[:3])} to {max(byol[:3])} times" in front
    few = (ROOT / "docs/shapes.md").read_text()
    assert f"[{aps['random', 1000]:.1f} box AP](benchmark.md#ap-against-labels)" in few


def test_settings():
    found = read_csv(str(SETTINGS))
    rows = {row.init: row.values("bbox/AP") for row in found if row.finetune == "held_out"}
    longer = {row.init: row for row in found if row.finetune == "held_out900"}
    page = section("Settings of the methods")
    header, _, *lines = table(page, "method", "own settings")
    suffixes = ["", "_half", "_twice", "_warm", "_boxes", "_annotated", "_groups"]
    shown = 0
    for name, line in zip(("ccop", "point", "byol", "moco"), lines, strict=True):
        for suffix, cell in zip(suffixes, line[1:], strict=True):
            values = rows.get(name + suffix, {})
            aps = [f"{values[seed, 1000]:.1f}" for seed in (0, 1) if (seed, 1000) in values]
            assert cell == (", ".join(aps) or "–"), name + suffix
            shown += len(aps)
    assert shown == sum(map(len, rows.values())) == 31
    of = {"SoCo": "soco", "MCL": "mcl", "CCOP": "ccop", "point-level region contrast": "point"}
    trials = {label: cells for label, *cells in table(page, "box AP / mask AP, 900 steps")[2:]}
    best = {}
    for label, init in {"MoCo v2": "moco", "BYOL": "byol", **of}.items():
        aps = [
            [longer[name].values(key)[7, 1000] for key in ("bbox/AP", "segm/AP")]
            for name in (init, f"{init}_twice", f"{init}_four")
            if name in longer
        ]
        cells = [f"{box:.1f} / {mask:.1f}" for box, mask in aps]
        assert trials.pop(label) == [*cells, "–"][:3], label
        rises = [b[0] - a[0] for a, b in itertools.pairwise(aps)]
        best[label] = 2 if rises[0] > 1 else 1
        assert len(rises) == best[label] and rises[-1] <= 1
    lines = table(page, "trial with 900 steps", "box AP / mask AP")[2:]
    others = ["moco_half", "byol_half", "soco_half", "soco_crops", "point_warm", "point_boxes"]
    assert [longer[name].label.replace("shapes-v1", "`shapes-v1`") for name in others] == [
        label for label, *_ in lines
    ]
    for name, (_, *cells) in zip(others, lines, strict=True):
        both = [
            [longer[init].values(key)[7, 1000] for key in ("bbox/AP", "segm/AP")]
            for init in (name, name.split("_")[0])
        ]
        assert cells == [f"{box:.1f} / {mask:.1f}" for box, mask in both]
        assert both[0][0] - both[1][0] <= 1
    assert set(longer) == {
        *others, *of.values(), "moco", "byol", "byol_four", "mcl_four",
        *(f"{init}_twice" for init in ("moco", "byol", *of.values())),
    }  # fmt: skip
    assert not trials and {k for k, times in best.items() if times == 2} == {"BYOL", "MCL"}
    assert "It chooses twice their own for BYOL and MCL, and their own for the" in page
    chosen = {row.init: row for row in read_csv(str(CHOSEN))}
    long = {row.init: row for row in read_csv(str(CSV))}
    to = {"over random weights": "random", "over MoCo v2": "moco", "over BYOL": "byol"}
    own = {"point_warm": {**to, "over temperature 0.1": "point"}, "byol_twice": to}
    for title, init in (("temperature 0.2", "point_warm"), (BYOL_TWICE, "byol_twice")):
        lines = table(page, title, "box AP")[2:]
        row = chosen[init]
        assert len(row.by_seeds) == 9
        expected = []
        found = [row.statistics(key) for key in ("bbox/AP", "segm/AP")]
        expected.append(["n = 9", *(f"{aps['mean']:.1f} ± {aps['std']:.1f}" for aps in found)])
        pairs = {label: (row, long[name]) for label, name in own[init].items()}
        if init == "byol_twice":
            pairs |= {f"{label} over it": (long[name], row) for label, name in of.items()}
        for label, (a, b) in pairs.items():
            both = [pair(a.values(key), b.values(key)) for key in ("bbox/AP", "segm/AP")]
            expected.append([label, *(str(difference(values)) for values in both)])
        assert lines == expected
    page = " ".join(page.split())
    gain = difference(pair(chosen["byol_twice"].values("bbox/AP"), long["byol"].values("bbox/AP")))
    assert f"by 2.7 on average, and in the results by {gain.mean:.1f}; with" in page
    at = [longer[init].values("bbox/AP")[7, 1000] for init in ("soco", "byol_twice")]
    assert "({:.1f}) is level with BYOL with twice its learning rate ({:.1f})".format(*at) in page
    rows = {init: {k: v for k, v in values.items() if k[0] < 2} for init, values in rows.items()}
    rows = {init: values for init, values in rows.items() if values}
    means = {init: sum(values.values()) / len(values) for init, values in rows.items()}
    below = [means["ccop"] - means[f"ccop_{s}"] for s in ("half", "twice", "warm", "boxes")]
    assert f"{min(below):.1f} to {max(below):.1f} below its own settings" in page
    assert all(means[f"{init}_twice"] < means[init] for init in ("ccop", "point"))
    assert f"annotated boxes are {means['ccop_annotated'] - means['ccop']:.1f} above" in page
    assert f"by {means['point_warm'] - means['point']:.1f} on average" in page
    gain = means["byol_twice"] - means["byol"]
    assert f"BYOL is better with twice its learning rate for both seeds, by {gain:.1f} on" in page
    assert all(rows["byol_twice"][at] > rows["byol"][at] for at in rows["byol"])
    apart = rows["moco"][1, 1000] - rows["moco"][0, 1000]
    assert f"MoCo v2 differ by {apart:.1f} with its own settings" in page
    higher, lower = (means[f"moco{k}"] - means["moco"] for k in ("_half", "_groups"))
    assert f"one is better and one worse, {higher:.1f} better on average" in page
    assert f"one better and one worse, and {-lower:.1f} worse on average: that" in page
    for init, values in rows.items():
        if init.startswith("ccop_"):
            assert any(values[seed, 1000] < rows["ccop"][seed, 1000] for seed in (0, 1)), init


REGIONS = {
    "SoCo, annotated boxes": "soco_annotated",
    "CCOP, annotated boxes": "ccop_annotated",
    "point-level region contrast, annotated boxes": "point_annotated",
    "point-level region contrast, selective search": "point_boxes",
}


def regions(finetune):
    found = read_csv(str(ROOT / "docs/results/shapes_regions.csv"))
    return {row.init: row for row in found if row.finetune == finetune}


def test_better_regions_after_900_steps():
    rows, page = regions("steps900"), section("Better regions")
    lines = table(page, "regions, 900 steps", "box AP")[2:]
    assert [line[0] for line in lines] == list(REGIONS) and list(rows) == list(REGIONS.values())
    gains = []
    for label, *cells in lines:
        init, expected = REGIONS[label], []
        for key in ("bbox/AP", "segm/AP"):
            own = {k: v for k, v in steps_900(init.split("_")[0], key).items() if k[0] == 7}
            mine = rows[init].values(key)
            assert list(mine) == list(own) and len(mine) == 2
            differences = [mine[seeds] - own[seeds] for seeds in mine]
            for values, form in (
                (mine.values(), ".1f"),
                (own.values(), ".1f"),
                (differences, "+.1f"),
            ):
                expected.append(", ".join(f"{value:{form}}" for value in values))
            gains += differences if key == "bbox/AP" else []
        assert cells == expected, label
    shown = f"differ by {min(gains):+.1f} to {max(gains):+.1f} box AP"
    assert shown in " ".join(page.split())


def test_better_regions():
    rows, inits = regions("detector"), REGIONS
    long = {row.init: row for row in read_csv(str(CSV))}
    page = section("Better regions")
    found = {}
    lines = table(page, "regions", "box AP")[2:]
    assert [line[0] for line in lines] == list(inits) and list(rows) == list(inits.values())
    for label, *cells in lines:
        init, expected = inits[label], []
        for key in ("bbox/AP", "segm/AP"):
            whole = long[init.split("_")[0]].values(key)
            mine = {seeds[:2]: value for seeds, value in rows[init].values(key).items()}
            own = {seeds[:2]: value for seeds, value in whole.items() if seeds[0] == 0}
            assert list(mine) == list(own) == [(0, 0), (0, 1), (0, 2)]
            for values in (mine, own):
                numbers = list(values.values())
                mean, std = statistics.fmean(numbers), statistics.stdev(numbers)
                expected.append(f"{mean:.1f} ± {std:.1f}")
            differences = [mine[seeds] - own[seeds] for seeds in mine]
            expected.append(", ".join(f"{value:+.1f}" for value in differences))
            found[init, key] = differences
        assert cells == expected, label
    text = " ".join(page.split())
    soco, boxes = found["soco_annotated", "bbox/AP"], found["point_boxes", "bbox/AP"]
    assert max(soco) < 0 and f"SoCo is {-statistics.fmean(soco):.1f} box AP lower" in text
    highest = max(rows["soco_annotated"].values("bbox/AP").values())
    soco = long["soco"].values("bbox/AP")
    nine = [value for seeds, value in soco.items() if seeds[0] < 3]
    fourth = [value for seeds, value in soco.items() if seeds[0] == 3]
    assert len(nine) == 9 and max(fourth) < highest < min(nine)
    assert f"(at most {highest:.1f})" in text and f"(at least {min(nine):.1f})" in text
    assert f"the fourth's ({min(fourth):.1f} to {max(fourth):.1f})" in text
    assert f"are {statistics.fmean(boxes):.1f} above for point-level" in text
    assert sum(value < 0 for value in boxes) == 1
    for init in ("ccop_annotated", "point_annotated"):
        assert min(found[init, "bbox/AP"]) < 0 < max(found[init, "bbox/AP"])
