"""The tables of the long Shapes benchmark agree with the committed rows."""

import itertools
import re
import statistics
from pathlib import Path

from result_pages import CHOSEN, CSV, NAMES, ROOT, section, steps_900, table

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

#: The pairs below random weights.
BELOW = {
    ("byol", "bbox/AP"): [-3.0, -0.6],
    ("moco", "bbox/AP"): [-1.9],
    ("moco", "segm/AP"): [-0.2],
}


def test_page_of_the_benchmark(tmp_path):
    page = section("AP after 300 steps")
    references = ["random", "moco", "byol"]
    assert " ".join(f"--reference {name}" for name in references) in page
    path, *_ = write_tables(str(CSV), references, str(tmp_path))
    made = Path(path).read_text()
    assert table(page, "initialisation", "n", "learning rate") == table(made, "initialisation")
    for label in ("random weights", "MoCo v2", "BYOL"):
        shown = table(page.split(f"Over {label}:\n\n")[1], "initialisation")
        full = table(made.split(f"Difference from {label}:")[1], "initialisation")
        assert full[0][:3] == ["initialisation", "n", "box AP"] and full[0][5] == "mask AP"
        left_out = ("full supervision", "random weights")
        kept = [line for line in full if not line[0].startswith(left_out)]
        assert shown == [[*line[:3], line[5]] for line in kept]


def test_readme():
    """The table of results: means, and differences in bold where the interval excludes 0."""
    text = (ROOT / "README.md").read_text()
    trained = table(text, "method", "trained on")[2:]
    assert {re.sub(r"\[(.*?)\].*", r"\1", line[0]) for line in trained} == set(NAMES)
    twice = {f"{name}, learning rate x 2": f"{NAMES[name]}_twice" for name in ("MCL", "BYOL")}
    names = {**NAMES, **twice, "random weights": "random"}
    rows = {init: steps_900(init) for init in names.values()}
    references = ["random", "moco", "byol", "byol_twice"]
    header, _, *lines = table(text, "initialisation", "box AP", "over random weights")
    assert {names[line[0]] for line in lines} == set(rows) and len(header) == 6
    for label, mean, *cells in lines:
        values = list(rows[names[label]].values())
        assert mean == f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}"
        for reference, cell in itertools.zip_longest(references, cells, fillvalue=""):
            if cell:
                found = difference(pair(rows[names[label]], rows[reference]))
                shown = f"{found.mean:+.1f} ± {found.standard_error:.1f}"
                excluded = found.low > 0 or found.high < 0
                assert cell == (f"**{shown}**" if excluded else shown), label
    for init in ("mcl", "mcl_twice", "soco", "ccop", "point"):
        (line,) = (line for line in lines if names[line[0]] == init)
        assert all(line[2:]) and len(line) == len(header)
    assert {len(rows[init]) for init in NAMES.values()} == {9} and len(rows["random"]) == 5
    assert {len(rows[init]) for init in twice.values()} == {8}
    shown = (
        "Nine fine-tunings of four pre-trainings (2 + 2 + 3 + 2); eight of those with twice the "
    )
    assert f"{shown}learning rate; five of random weights." in text
    long = {row.init: row.values("bbox/AP") for row in read_csv(str(CSV))}
    gains = {
        label: difference(pair(long[init], long["random"])).mean for label, init in NAMES.items()
    }
    short = " ".join(text.split())
    shown = "MCL is {MCL:.1f} above random weights, SoCo {SoCo:.1f}, CCOP {CCOP:.1f} and "
    shown += "point-level contrast {Point-level region contrast:.1f}"
    assert shown.format(**gains) in short
    (twice,) = (r.values("bbox/AP") for r in read_csv(str(CHOSEN)) if r.init == "byol_twice")
    to = [difference(pair(long[init], twice)) for init in ("mcl", "soco")]
    assert all(d.low > 0 for d in to)
    assert "above the tuned BYOL, by {:.1f} and {:.1f}.".format(*(d.mean for d in to)) in short


def test_random_weights_on_two_processors():
    (random,) = (row for row in read_csv(str(CSV)) if row.init == "random")
    assert len(random.by_seeds) == 11
    machines = {machine for *_, machine in random.by_seeds}
    page = " ".join(section("AP after 300 steps").split())
    shown = []
    for machine in sorted(machines, reverse=True):  # with AVX-512 first
        aps = [random.by_seeds[None, seed, machine]["bbox/AP"] for seed in range(3)]
        shown.append(f"{statistics.fmean(aps):.1f} ± {statistics.stdev(aps):.1f}")
    assert f"have {shown[0]} and {shown[1]} with the same seeds" in page
    assert f"standard deviation of {random.statistics('bbox/AP')['std']:.1f};" in page


def test_halves_of_the_pre_trainings():
    """The first two seeds and the last two differ in processor and precision."""
    rows = {row.init: row.values("bbox/AP") for row in read_csv(str(CSV))}
    lines = table(section("AP after 300 steps"), "| over random weights: seeds 0, 1")[2:]
    names = {**NAMES, "point-level region contrast": "point"}
    assert [names[label] for label, *_ in lines] == ["soco", "ccop", "mcl", "point"]
    for label, *cells in lines:
        expected = []
        for reference, half in itertools.product(("random", "moco", "byol"), ((0, 1), (2, 3))):
            pairs = pair(rows[names[label]], rows[reference])
            mine = [value for seeds, value in pairs.items() if seeds[0] in half]
            assert len(mine) == 6
            expected.append(f"{statistics.fmean(mine):+.1f}")
        assert cells == expected, label


def test_readings():
    rows = {row.init: row for row in read_csv(str(CSV))}

    def pairs(init, reference, key="bbox/AP"):
        return pair(rows[init].values(key), rows[reference].values(key))

    def errors(init, reference, key="bbox/AP"):
        """The mean difference in standard errors, and the lower end of the interval."""
        found = difference(pairs(init, reference, key))
        return found.mean / found.standard_error, found.low

    for key in ("bbox/AP", "segm/AP"):
        for init in NAMES.values():
            below = [v for v in pairs(init, "random", key).values() if v < 0]
            assert [round(v, 1) for v in below] == BELOW.get((init, key), [])
            assert (errors(init, "random", key)[1] > 0) == (init != "byol" or key == "segm/AP")
        for init, reference in itertools.product(("soco", "mcl"), ("moco", "byol")):
            below = [value for value in pairs(init, reference, key).values() if value < 0]
            one = (init, reference) == ("soco", "byol")
            assert [round(value, 1) for value in below] == one * [-0.9 if key[0] == "b" else -0.0]
            assert errors(init, reference, key)[1] > 0
        for init in ("soco", "mcl", "ccop", "point"):
            for reference in ("random", "moco", "byol"):
                more = errors(init, reference, key)[0] > 2
                assert more == ((init, reference, key) != ("point", "byol", "segm/AP"))
    assert round(errors("point", "byol", "segm/AP")[0], 1) == 1.8
    for key, excluded in (
        ("bbox/AP", {("ccop", "moco"), ("point", "moco"), ("ccop", "byol")}),
        ("segm/AP", {("point", "moco")}),
    ):
        for both in itertools.product(("ccop", "point"), ("moco", "byol")):
            assert (errors(*both, key)[1] > 0) == (both in excluded)
    positive = {
        both: sum(value > 0 for value in pairs(*both).values())
        for both in itertools.product(("ccop", "point"), ("moco", "byol"))
    }
    assert list(positive.values()) == [10, 10, 10, 11]
    assert sum(len(pairs(init, "random")) for init in NAMES.values()) == 72
