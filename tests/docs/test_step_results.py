"""Fine-tunings of several lengths: the pages agree with the committed rows."""

import itertools
import statistics
from collections import Counter
from pathlib import Path

from result_pages import ROOT, STEPS, steps_900, table

from region_pretrain.sweeps.intervals import difference, pair
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.rows import read_csv


def test_steps_of_fine_tuning(tmp_path):
    """The tables, the gains in pairs of equal seeds, and where the pages name them."""
    rows = {(r.init, r.finetune, r.labels): r for r in read_csv(str(STEPS))}
    page = (ROOT / "projects/README.md").read_text()
    page = page[page.index("### AP against fine-tuning steps") : page.index("### Settings of the")]
    names = {"random weights": "random", "MoCo v2": "moco", "BYOL": "byol", "SoCo": "soco"}
    names |= {"CCOP": "ccop", "MCL": "mcl", "point-level region contrast": "point"}
    regional, baselines = ("soco", "ccop", "mcl", "point"), ("random", "moco", "byol")
    tasks = ("bbox/AP", "segm/AP")

    def values(init, steps, labels, seed, key="bbox/AP"):
        """Of one pre-training, or of random weights on its processor, by fine-tuning seed."""
        row = rows.get((init, steps, labels))
        found = row.values(key) if row else {}
        processor = {3: "EPYC"}.get(seed, "Xeon")
        return {k[1]: v for k, v in found.items() if k[0] in (None, seed) and processor in k[2]}

    columns = [
        ("steps300", 100, 3),
        *(("steps900", 100, s) for s in (3, 4, 5, 6)),
        *(("steps900", 25, s) for s in (3, 4, 5)),
    ]
    for caption, key in zip(("box AP", "mask AP"), tasks, strict=True):
        lines = table(page, caption, "300 steps, seed 3")[2:]
        assert [label for label, *_ in lines] == list(names)
        for label, *cells in lines:
            for column, cell in zip(columns, cells, strict=True):
                found = sorted(values(names[label], *column, key).items())
                assert cell == (", ".join(f"{v:.1f}" for _, v in found) or "–"), (label, column)

    found, count = {}, 0
    for caption, key in zip(("box AP", "mask AP"), tasks, strict=True):
        lines = table(page, f"{caption}, 900 steps", "n", "to random weights")[2:]
        assert [names[label] for label, *_ in lines] == [i for i in names.values() if i != "random"]
        for label, n, *cells in lines:
            for reference, cell in zip(baselines, cells, strict=True):
                if reference == names[label]:
                    assert cell == "–"
                    continue
                mine = pair(steps_900(names[label], key), steps_900(reference, key))
                found[names[label], reference, key] = difference(mine)
                above = sum(value > 0 for value in mine.values())
                assert cell == f"{difference(mine)} ({above}/{n})" and len(mine) == int(n)
                if names[label] in regional:
                    assert above == int(n)
            count = n
    ours = {at: d for at, d in found.items() if at[0] in regional}
    small = {at: d for at, d in ours.items() if d.mean <= 2 * d.standard_error}
    assert len(ours) == 24 and list(small) == [("point", "byol", "segm/AP")]
    clear = Counter(at[1] for at, d in ours.items() if d.low > 0)

    page, front = " ".join(page.split()), " ".join((ROOT / "README.md").read_text().split())
    few = " ".join((ROOT / "docs/labelled_data.md").read_text().split())
    assert f"is above the other three in all {count} pairs, in box and in mask AP." in page
    (least,) = small.values()
    text = "in 23 of the 24 comparisons; that of point-level region contrast to BYOL in mask AP is "
    assert f"{text}{least.mean / least.standard_error:.2f}." in page
    text = f"in all {count} pairs, in box and in mask AP, by more than two standard errors in 23 of"
    assert f"{text} the 24 comparisons; the 95 % intervals exclude 0 in {clear.total()} of" in front
    text = (
        "exclude 0 in {} of the eight comparisons with random weights, {} with MoCo v2 and {} with"
    )
    assert text.format(*(clear[reference] for reference in baselines)) in page

    def mean(init):
        return statistics.fmean(steps_900(init).values())

    low = "random weights reach {:.1f} box AP, MoCo v2 {:.1f} and BYOL {:.1f}; "
    labels = {init: label.removesuffix(" region contrast") for label, init in names.items()}
    order = sorted(regional, key=lambda init: -mean(init))
    high = "{}, {}, {} and {}.".format(*(f"{labels[i]} {mean(i):.1f}" for i in order))
    assert low.format(*map(mean, baselines)) + high in page
    byol = pair(steps_900("byol"), steps_900("random"))
    gains = [found[i, "random", "bbox/AP"].mean for i in ("byol", "moco")]
    text = "BYOL is {:.1f} box AP above random weights, in {} pairs of {}, and MoCo v2 {:.1f}."
    assert text.format(gains[0], sum(v > 0 for v in byol.values()), count, gains[1]) in page
    apart = {}
    for init in labels:
        means = [statistics.fmean(list(values(init, *columns[c]).values())[:2]) for c in (2, 3, 4)]
        apart[init] = max(means) - min(means)
    del apart["random"]
    widest = max(apart, key=apart.get)
    text = f"differ by {min(apart.values()):.1f} to {apart[widest]:.1f} ({labels[widest]})."
    assert text in page

    spread = {
        length: max(
            max(found.values()) - min(found.values())
            for init in labels
            for column in columns[:5]
            if column[0] == length and init != "random" and (found := values(init, *column))
        )
        for length in ("steps300", "steps900")
    }
    text = (
        "up to {:.1f} with 300 steps and by up to {:.1f} with 900, those of random weights on the"
    )
    random = steps_900("random").values()
    text = f"{text} Xeon by {max(random) - min(random):.1f}."
    assert text.format(*spread.values()) in page

    shorter = {}
    for init, column in itertools.product(("mcl", "soco", "random"), columns[:2]):
        shorter[init, column[0]] = [values(init, *column)[seed] for seed in (0, 1)]
    gains = [
        statistics.fmean(shorter[init, length]) - statistics.fmean(shorter["random", length])
        for init in ("mcl", "soco")
        for length in ("steps300", "steps900")
    ]
    text = (
        "MCL's gain in box AP falls from {:.1f} with 300 steps to {:.1f} with 900, and SoCo's from"
    )
    assert f"{text} {{:.1f}} to {{:.1f}}".format(*gains) in page and gains[1] < gains[0] / 2
    random = [statistics.fmean(shorter["random", n]) for n in ("steps300", "steps900")]
    text = (
        "raised random weights from {:.0f} to {:.0f} box AP and lowered MCL's gain [from {:.1f} to"
    )
    assert f"{text} {{:.1f}}]".format(*random, *gains[:2]) in few

    def above(init):
        """On 25 scenes, from the first seed to the last."""
        pairs = [(values(init, *c), values("random", *c)) for c in columns[5:]]
        return [f"{mine[0] - base[0]:.1f}" for mine, base in pairs if mine]

    mcl = "{}, {} and {}".format(*above("mcl"))
    assert f"MCL is {mcl} box AP above random weights" in page
    assert f"MCL is {mcl} above random weights" in front
    assert f"On 25 images, with 900 steps, it was {mcl}." in few
    others = [
        "{} and {}".format(*above(init)) for init in ("ccop", "point", "soco", "moco", "byol")
    ]
    text = "CCOP {}, point-level {}, SoCo {}, MoCo v2 {} and BYOL {}."
    assert text.format(*others) in page
    text = "CCOP {}, point-level contrast {}, and SoCo {} ("
    assert text.format(*others[:3]) in front
    path, *figures = write_tables(str(STEPS), ["random"], str(tmp_path))
    assert any(figure.endswith("_runs_steps900_1_box_ap.png") for figure in figures)
    assert (ROOT / "docs/shapes_steps.png").stat().st_size > 10_000
    made = Path(path).read_text()
    worth = {
        label: cell.split()
        for label, cell, *_ in table(made[made.index("same box AP") :], "initialisation")[2:]
    }
    ratio = worth["MCL"][1].lstrip("(")
    text = f"25 scenes are worth {worth['MCL'][0]} of theirs with MCL ({ratio} x), "
    text += f"{worth['CCOP'][0]} with CCOP, {worth['point-level region contrast'][0]} with "
    assert f"{text}point-level region contrast and {worth['SoCo'][0]} with SoCo." in page
