"""The tables of the long Shapes benchmark agree with the committed rows."""

import itertools
import re
import statistics
from pathlib import Path

from result_pages import CSV, LENGTHS, NAMES, ROOT, section, table, tuned

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
    """The table of results: cost, means and differences."""
    text = (ROOT / "README.md").read_text()
    trained = table(text, "method", "trained on")[2:]
    assert {re.sub(r"\[(.*?)\].*", r"\1", line[0]) for line in trained} == set(NAMES)
    names = {label: init for label, init in NAMES.items() if init not in ("mcl", "byol")}
    names |= {f"{name}, learning rate x 2": f"{NAMES[name]}_twice" for name in ("MCL", "BYOL")}
    names["random weights"] = "random"
    rows = {init: tuned(init) for init in names.values()}
    minutes = {row.init: row.cost.minutes for row in read_csv(str(LENGTHS))}
    _, _, *lines = table(text, "initialisation", "minutes", "box AP", "over random weights")
    assert {names[line[0]] for line in lines} == set(rows)
    for label, *cells in lines:
        init = names[label]
        values, cost = list(rows[init].values()), minutes.get(init.removesuffix("_twice"))
        expected = ["–" if init == "random" else f"{cost:.0f}"]
        expected.append(f"{statistics.fmean(values):.1f} ± {statistics.stdev(values):.1f}")
        for reference in ("random", "byol_twice"):
            none = init in ("random", reference)
            found = "–" if none else str(difference(pair(rows[init], rows[reference])))
            expected.append(found)
        assert cells == expected, label
    trained = {init: {seeds[0] for seeds in of} for init, of in rows.items() if init != "random"}
    assert {min(map(len, trained.values())), max(map(len, trained.values()))} == {2, 4}
    assert all(len(rows[init]) == 2 * len(seeds) for init, seeds in trained.items())
    assert "Two to four pre-trainings of each method and two fine-tunings of each." in text
    long = {row.init: row.values("bbox/AP") for row in read_csv(str(CSV))}
    gains = {
        label: difference(pair(long[init], long["random"])).mean for label, init in NAMES.items()
    }
    shown = "MCL is {MCL:.1f} above random weights, SoCo {SoCo:.1f}, CCOP {CCOP:.1f} and "
    shown += "point-level contrast {Point-level region contrast:.1f}"
    assert shown.format(**gains) in " ".join(text.split())


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
