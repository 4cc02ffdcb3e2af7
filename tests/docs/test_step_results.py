"""Fine-tunings of several lengths: the pages agree with the committed rows."""

import itertools
import statistics

from result_pages import (
    ROOT,
    STEPS,
    difference_cells,
    run_cells,
    section,
    steps_900,
    table,
)

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv

NAMES = {
    "random weights": "random", "MoCo v2": "moco", "BYOL": "byol",
    "BYOL, learning rate x 2": "byol_twice", "SoCo": "soco", "CCOP": "ccop", "MCL": "mcl",
    "MCL, learning rate x 2": "mcl_twice", "point-level region contrast": "point",
}  # fmt: skip
OWN = {label: init for label, init in NAMES.items() if not init.endswith("_twice")}
FEW, EARLIER = (
    {(r.init, r.finetune): r for r in read_csv(str(ROOT / f"docs/results/shapes_{name}.csv"))}
    for name in ("few", "convergence")
)
REGIONAL, BASELINES = ("soco", "ccop", "mcl", "point"), ("random", "moco", "byol")
TASKS = {"box AP": "bbox/AP", "mask AP": "segm/AP"}
SEEDS = (4, 5, 6, 7)


def beside(seed):
    """Where random weights were fine-tuned that are compared with this pre-training."""
    return {3: "AVX2", 7: "AMD EPYC, AVX512"}.get(seed, "Xeon")


def page():
    return section("Settings of the Shapes configs")


def words(path):
    return " ".join((ROOT / path).read_text().split())


def test_tables_of_all_runs():
    assert {(row.finetune, row.labels) for row in read_csv(str(STEPS))} == {("steps900", 100)}
    for task, key in TASKS.items():
        lines = table(page(), task, "own rate, seed 4")[2:]
        assert [label for label, *_ in lines] == list(OWN)
        for label, *cells in lines:
            assert cells == run_cells(steps_900(OWN[label], key), SEEDS, beside), label
        lines = table(section("25 of the 100 scenes"), task, "25 scenes, seed 3")[2:]
        assert [label for label, *_ in lines] == list(NAMES)
        for label, *cells in lines:
            row = FEW[NAMES[label], "steps900"]
            assert row.labels == 25
            assert cells == run_cells(row.values(key), (3, 4, 5, 7), beside), label


def test_table_of_300_and_900_steps():
    header, _, *lines = table(section("300 and 900 steps"), "AP", "random weights")
    inits = [NAMES[label] for label in header[1:]]
    assert {init for init, _ in EARLIER} == set(inits) and len(lines) == 4
    for label, *cells in lines:
        caption, steps = label.split(", ")
        for init, cell in zip(inits, cells, strict=True):
            values = EARLIER[init, f"steps{steps[:3]}"].values(TASKS[caption])
            assert [cell] == run_cells(values, [3], beside), label


def test_tables_of_differences():
    for task, key in TASKS.items():
        lines = table(page(), f"{task}, own rate", "over random weights")[2:]
        assert [OWN[label] for label, *_ in lines] == [*OWN.values()][1:]
        references = [steps_900(init, key) for init in BASELINES]
        for label, *cells in lines:
            assert cells == difference_cells(steps_900(OWN[label], key), references), label


def mean(init):
    return statistics.fmean(steps_900(init).values())


def gain(init):
    return difference(pair(steps_900(init), steps_900("random"))).mean


def test_comparisons_of_900_steps():
    text, front = " ".join(page().split()), words("README.md")
    ours = {
        (init, reference, task): pair(steps_900(init, key), steps_900(reference, key))
        for init, reference in itertools.product(REGIONAL, BASELINES)
        for task, key in TASKS.items()
    }
    below = {at: min(pairs.values()) for at, pairs in ours.items() if min(pairs.values()) < 0}
    found = {at: difference(pairs) for at, pairs in ours.items()}
    weak = {at: d for at, d in found.items() if d.low <= 0}
    assert {len(pairs) for pairs in ours.values()} == {9} and len(ours) == 24
    assert list(below) == list(weak) == [("point", "byol", "mask AP")]
    assert all(d.mean > 2 * d.standard_error for at, d in found.items() if at not in weak)
    ((lowest, least),) = zip(below.values(), weak.values(), strict=True)
    reached = "Random weights reach {:.1f} box AP, MoCo v2 {:.1f} and BYOL {:.1f}; MCL {:.1f}, "
    reached += "CCOP {:.1f}, point-level {:.1f} and SoCo {:.1f}."
    order = ("random", "moco", "byol", "mcl", "ccop", "point", "soco")
    assert reached.format(*map(mean, order)) in text
    above = (
        "Each region method is above random weights, MoCo v2 and BYOL in all 9 pairs, in box and "
    )
    above += "in mask AP, with one exception: point-level region contrast against BYOL in mask AP "
    above += f"({lowest:.1f}). In 23 of these 24 comparisons the mean difference is more than two "
    above += (
        "standard errors and the 95 % interval excludes 0; that of point-level region contrast "
    )
    ratio = least.mean / least.standard_error
    assert f"{above}over BYOL in mask AP is {ratio:.1f} standard errors." in text
    low = found["soco", "byol", "box AP"].low
    assert f"some lower ends are close to 0 ({low:.1f} for SoCo over BYOL)" in text
    shown = "in all 9 pairs, except for one pair of point-level contrast and BYOL in mask AP"
    assert shown in front
    assert "exclude 0 in 23 of the 24 comparisons" in front
    gains = [gain(init) for init in ("mcl", "soco", "ccop", "point")]
    assert "against {:.1f}, {:.1f}, {:.1f} and {:.1f} after 900".format(*gains) in front


def test_lengths_and_spreads():
    text, few = " ".join(section("300 and 900 steps").split()), words("docs/labelled_data.md")
    both = {
        (init, steps): statistics.fmean(
            value
            for seeds, value in EARLIER[init, steps].values("bbox/AP").items()
            if seeds[1] in (0, 1)
        )
        for init in ("mcl", "soco", "random")
        for steps in ("steps300", "steps900")
    }
    gains = [
        both[init, steps] - both["random", steps]
        for init in ("mcl", "soco")
        for steps in ("steps300", "steps900")
    ]
    shown = "falls from {:.1f} box AP with 300 steps to {:.1f} with 900, and SoCo's from {:.1f} to "
    assert f"{shown}{{:.1f}}.".format(*gains) in text and gains[1] < gains[0] / 2
    random = [both["random", steps] for steps in ("steps300", "steps900")]
    shown = (
        "raised random weights from {:.0f} to {:.0f} box AP and lowered MCL's gain [from {:.1f} "
    )
    assert f"{shown}to {{:.1f}}]".format(*random, *gains[:2]) in few

    apart, spreads = {}, []
    for init in [*OWN.values()][1:]:
        found = {}
        for (seed, finetune, _), value in steps_900(init).items():
            found.setdefault(seed, {})[finetune] = value
        means = [statistics.fmean([of[0], of[1]]) for of in found.values()]
        apart[init] = max(means) - min(means)
        spreads += [max(of.values()) - min(of.values()) for of in found.values()]
    assert max(apart, key=apart.get) == "ccop"
    shown = f"differ by {min(apart.values()):.1f} to {apart['ccop']:.1f} box AP (CCOP), the"
    text = " ".join(page().split())
    assert shown in text
    random = [value for seeds, value in steps_900("random").items() if "Xeon" in seeds[2]]
    shown = f"by up to {max(spreads):.1f}, those of random weights on the Xeon by "
    assert f"{shown}{max(random) - min(random):.1f}." in text


def test_few_labels(tmp_path):
    text = " ".join(section("25 of the 100 scenes").split())

    def above(init):
        """On 25 scenes, from the first seed to the last."""
        pairs = pair(
            FEW[init, "steps900"].values("bbox/AP"), FEW["random", "steps900"].values("bbox/AP")
        )
        gains = [f"{value:.1f}" for _, value in sorted(pairs.items())]
        return " and ".join([", ".join(gains[:-1]), gains[-1]]) if gains[1:] else gains[0]

    mcl = above("mcl")
    assert f"MCL is {mcl} box AP above random weights" in text
    others = [above(init) for init in ("ccop", "point", "soco", "moco", "byol")]
    shown = "CCOP {}, point-level {}, SoCo {}, MoCo v2 {} and BYOL {}."
    assert shown.format(*others) in text
    ends = [sorted(map(float, of.replace(" and", ",").split(", "))) for of in (mcl, others[0])]
    shown = "MCL gains {} to {} box AP and CCOP {} to {}, but SoCo only {}"
    values = [end for of in ends for end in (of[0], of[-1])]
    assert shown.format(*values, others[2]) in words("README.md")
    shown = f"twice its learning rate is {above('byol_twice')} above the random weights of seed 7"
    assert shown in text
    assert f", and MCL with twice its own {above('mcl_twice')}." in text
    _, *figures = write_tables(str(STEPS), ["random"], str(tmp_path))
    assert any(figure.endswith("steps_runs_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_steps.png").stat().st_size > 10_000
