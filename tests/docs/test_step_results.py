"""Fine-tunings of several lengths: the pages agree with the committed rows."""

import itertools
import statistics

from result_pages import ROOT, STEPS, section, steps_900, table

from region_pretrain.sweeps.intervals import difference, pair, pairs_of_two_machines
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

NAMES = {
    "random weights": "random", "MoCo v2": "moco", "BYOL": "byol",
    "BYOL, learning rate x 2": "byol_twice", "SoCo": "soco", "CCOP": "ccop", "MCL": "mcl",
    "MCL, learning rate x 2": "mcl_twice", "point-level region contrast": "point",
}  # fmt: skip
CONVERGENCE = ROOT / "docs/results/shapes_convergence.csv"
ROWS, EARLIER = (
    {(r.init, r.finetune, r.labels): r for r in read_csv(str(path))}
    for path in (STEPS, CONVERGENCE)
)
FEW = {init for init, steps, labels in ROWS if labels == 25}
REGIONAL, BASELINES = ("soco", "ccop", "mcl", "point"), ("random", "moco", "byol", "byol_twice")
TASKS = {"box AP": "bbox/AP", "mask AP": "segm/AP"}


def values(init, steps, labels, seed, key="bbox/AP"):
    """Of one pre-training, or of random weights on its processor, by fine-tuning seed."""
    row = (EARLIER if seed == 3 else ROWS).get((init, steps, labels))
    found = row.values(key) if row else {}
    beside = {3: "AVX2", 7: "AMD EPYC, AVX512"}.get(seed, "Xeon")
    return {k[1]: v for k, v in found.items() if k[0] == seed or (k[0] is None and beside in k[2])}


def page():
    return section("AP after 900 steps")


def words(path):
    return " ".join((ROOT / path).read_text().split())


def listed(found):
    return ", ".join(f"{value:.1f}" for _, value in sorted(found.items())) or "–"


def test_tables_of_all_runs():
    assert {steps for _, steps, _ in ROWS} == {"steps900"}
    few = section("25 of the 100 scenes")
    for caption, key in TASKS.items():
        for text, first, labels, seeds in (
            (page(), "900 steps, seed 4", 100, (4, 5, 6, 7)),
            (few, "25 scenes, seed 3", 25, (3, 4, 5, 7)),
        ):
            lines = table(text, caption, first)[2:]
            names = [name for name, init in NAMES.items() if labels == 100 or init in FEW]
            assert [label for label, *_ in lines] == names
            for label, *cells in lines:
                for seed, cell in zip(seeds, cells, strict=True):
                    found = values(NAMES[label], "steps900", labels, seed, key)
                    assert cell == listed(found), label


def test_table_of_300_and_900_steps():
    header, _, *lines = table(section("300 and 900 steps"), "AP", "random weights")
    inits = [NAMES[label] for label in header[1:]]
    assert {init for init, *_ in EARLIER} == set(inits) and len(lines) == 4
    for label, *cells in lines:
        caption, steps = label.split(", ")
        for init, cell in zip(inits, cells, strict=True):
            found = values(init, f"steps{steps[:3]}", 100, 3, TASKS[caption])
            assert cell == listed(found), label


def differences():
    return {
        (init, reference, task): pair(steps_900(init, key), steps_900(reference, key))
        for init, reference in itertools.permutations(NAMES.values(), 2)
        for task, key in TASKS.items()
    }


def test_tables_of_differences():
    found = differences()
    for task in TASKS:
        lines = table(page(), f"{task}, 900 steps", "over random weights")[2:]
        assert [NAMES[label] for label, *_ in lines] == [*NAMES.values()][1:]
        for label, *cells in lines:
            for reference, cell in zip(BASELINES, cells, strict=True):
                if reference == NAMES[label]:
                    assert cell == "–"
                    continue
                pairs = found[NAMES[label], reference, task]
                above = sum(value > 0 for value in pairs.values())
                assert cell == f"{difference(pairs)} ({above}/{len(pairs)})", (label, reference)


def mean(init, task="box AP"):
    return statistics.fmean(steps_900(init, TASKS[task]).values())


def test_comparisons_of_900_steps():
    found, text, front = differences(), " ".join(page().split()), words("README.md")
    ours = {
        at: found[at] for at in found if at[0] in REGIONAL and at[1] in ("random", "moco", "byol")
    }
    below = {at: min(pairs.values()) for at, pairs in ours.items() if min(pairs.values()) < 0}
    weak = {at: d for at in ours if (d := difference(ours[at])).low <= 0}
    assert {len(pairs) for pairs in ours.values()} == {9} and len(ours) == 24
    assert list(below) == list(weak) == [("point", "byol", "mask AP")]
    assert all(
        d.mean > 2 * d.standard_error
        for at in ours
        if at not in weak and (d := difference(ours[at]))
    )
    ((lowest, least),) = zip(below.values(), weak.values(), strict=True)
    reached = (
        "random weights reach {:.1f} box AP, MoCo v2 {:.1f} and BYOL {:.1f}; MCL {:.1f}, CCOP "
    )
    reached += "{:.1f}, point-level {:.1f} and SoCo {:.1f}."
    order = ("random", "moco", "byol", "mcl", "ccop", "point", "soco")
    assert reached.format(*map(mean, order)) in text
    above = "is above the other three in all 9 pairs, in box and in mask AP, but for one of "
    above += f"point-level region contrast and BYOL in mask AP ({lowest:.1f}). In 23 of these 24 "
    above += (
        "comparisons the mean difference is more than two standard errors and the 95 % interval "
    )
    above += "excludes 0; that of point-level region contrast over BYOL in mask AP is "
    assert f"{above}{least.mean / least.standard_error:.1f} standard errors." in text
    shown = "in all 9 pairs, except for one pair of point-level contrast and BYOL in mask AP."
    assert shown in front
    assert "exclude 0 in 23 of the 24 comparisons in box and mask AP;" in front


def test_tuned_learning_rates():
    found, text, front = differences(), " ".join(page().split()), words("README.md")
    for init, own in (("byol_twice", "byol"), ("mcl_twice", "mcl")):
        gain = found[init, own, "box AP"]
        assert min(gain.values()) > 0
        shown = f"has {mean(init):.1f} box AP, {difference(gain).mean:.1f} above its own, in all "
        shown += f"{len(gain)} pairs"
        assert shown in text, init
    tuned = ("mcl_twice", "soco", "ccop", "point")
    to = {(init, task): found[init, "byol_twice", task] for init in tuned for task in TASKS}
    box, mask = (difference(to["mcl_twice", task]) for task in TASKS)
    assert min(min(to["mcl_twice", task].values()) for task in TASKS) > 0
    assert box.low > 0 and mask.low > 0
    n = len(to["mcl_twice", "box AP"])
    shown = f"by {box.mean:.1f} box AP and {mask.mean:.1f} mask AP, in all {n} pairs"
    assert shown in text and f"by {box.mean:.1f} box AP in all {n} pairs" in front
    others = [difference(to[init, "box AP"]) for init in ("ccop", "soco", "point")]
    assert all(d.low < 0 < d.high for d in others)
    shown = "CCOP is at {:+.1f} box AP from that BYOL, SoCo at {:+.1f} and point-level region "
    assert f"{shown}contrast at {{:+.1f}}".format(*(d.mean for d in others)) in text
    shown = "SoCo {:+.1f} and point-level contrast {:+.1f}".format(*(d.mean for d in others[1:]))
    assert f"CCOP is at {others[0].mean:+.1f}, {shown}" in front
    for init in ("ccop", "soco", "point"):
        machines = [pairs_of_two_machines(steps_900(init), steps_900("byol_twice"))]
        assert machines == [6] and len(to[init, "box AP"]) == 8
    seven = [
        [f"{v:+.1f}" for seeds, v in to[init, "box AP"].items() if seeds[0] == 7]
        for init in ("ccop", "soco", "point")
    ]
    shown = "the pairs are {} and {} (CCOP), {} and {} (SoCo) and {} and {} (point-level)."
    assert shown.format(*itertools.chain(*seven)) in text
    point = difference(to["point", "mask AP"])
    assert point.high < 0
    assert f"point-level region contrast is {-point.mean:.1f} below it, and that interval" in text
    (lowest,) = {difference(found["soco", "byol", task]).low for task in TASKS if task == "box AP"}
    assert f"some lower ends are close to 0 ({lowest:.1f} for SoCo over BYOL)" in text


def test_lengths_and_spreads():
    text, few = " ".join(page().split()), words("docs/labelled_data.md")
    columns = [("steps300", 100, 3), ("steps900", 100, 3)]
    both = {
        (init, column[0]): [values(init, *column)[seed] for seed in (0, 1)]
        for init in ("mcl", "soco", "random")
        for column in columns
    }
    gains = [
        statistics.fmean(both[init, n]) - statistics.fmean(both["random", n])
        for init in ("mcl", "soco")
        for n, *_ in columns
    ]
    shown = "falls from {:.1f} box AP with 300 steps to {:.1f} with 900, and SoCo's from {:.1f} to "
    assert f"{shown}{{:.1f}}.".format(*gains) in text and gains[1] < gains[0] / 2
    random = [statistics.fmean(both["random", n]) for n, *_ in columns]
    shown = (
        "raised random weights from {:.0f} to {:.0f} box AP and lowered MCL's gain [from {:.1f} "
    )
    assert f"{shown}to {{:.1f}}]".format(*random, *gains[:2]) in few

    trained = [init for init in NAMES.values() if init != "random"]
    apart = {}
    for init in trained:
        means = [
            statistics.fmean([values(init, "steps900", 100, seed)[f] for f in (0, 1)])
            for seed in (4, 5, 6, 7)
        ]
        apart[init] = max(means) - min(means)
    assert max(apart, key=apart.get) == "ccop"
    assert f"differ by {min(apart.values()):.1f} to {apart['ccop']:.1f} box AP (CCOP), the" in text
    spread = max(
        max(found.values()) - min(found.values())
        for init in trained
        for seed in (4, 5, 6, 7)
        if (found := values(init, "steps900", 100, seed))
    )
    random = values("random", "steps900", 100, 4).values()
    shown = f"by up to {spread:.1f}, those of random weights on the Xeon by "
    assert f"{shown}{max(random) - min(random):.1f}." in text


def test_few_labels(tmp_path):
    text, front = " ".join(section("25 of the 100 scenes").split()), words("README.md")

    def above(init, beside=None):
        """On 25 scenes, from the first seed to the last."""
        pairs = [
            [values(init, "steps900", 25, seed), values("random", "steps900", 25, beside or seed)]
            for seed in (3, 4, 5, 7)
        ]
        gains = [f"{mine[0] - base[0]:.1f}" for mine, base in pairs if mine]
        return " and ".join([", ".join(gains[:-1]), gains[-1]]) if gains[1:] else gains[0]

    mcl = above("mcl")
    assert f"MCL is {mcl} box AP above random weights" in text
    assert f"MCL with its own rate is {mcl} above random weights" in front
    others = [above(init) for init in ("ccop", "point", "soco", "moco", "byol")]
    shown = "CCOP {}, point-level {}, SoCo {}, MoCo v2 {} and BYOL {}."
    assert shown.format(*others) in text
    tuned, once = above("byol_twice", 7), above("mcl_twice")
    assert f"twice its learning rate is {tuned} above the random weights of seed 7" in text
    assert f", and MCL with twice its own {once}." in text
    assert "CCOP {}, point-level contrast {}, and SoCo {} (".format(*others[:3]) in front
    _, *figures = write_tables(str(STEPS), ["random"], str(tmp_path))
    assert any(figure.endswith("_runs_1_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_steps.png").stat().st_size > 10_000
