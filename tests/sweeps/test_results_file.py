"""A results.csv alone: read back, and turned into tables and figures by one command."""

import re
from pathlib import Path

import numpy as np
import pytest
from forked import run_tool
from PIL import Image
from scipy import stats

from region_pretrain.errors import UserError
from region_pretrain.progress import Progress, write_progress
from region_pretrain.sweeps.figures import figures
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Run
from region_pretrain.sweeps.report import write_tables
from region_pretrain.sweeps.results import collect
from region_pretrain.sweeps.rows import METRICS, Cost, Row, read_csv, results_csv
from region_pretrain.sweeps.tables import tables

ROOT = Path(__file__).parents[2]
METHODS = {"random": "random weights", "moco": "MoCo v2", "soco": "SoCo"}


def rows_of(counts=(25, 100), lengths=(0,)):
    """3 pre-training seeds x 3 fine-tuning seeds per label count, with random AP."""
    rng, rows = np.random.default_rng(0), []
    for labels in counts:
        for init, label in METHODS.items():
            for length in (0,) if init == "random" else lengths:
                name, images = (init, 0) if init == "random" else (f"{init}{length}", 320 + length)
                row = Row(name if length else init, f"{label} {length}" if length else label, label,
                          "det", labels / 100, "final", labels, images, 9, "0.05")  # fmt: skip
                for p in (None,) if init == "random" else (0, 1, 2):
                    for f in (0, 1, 2):
                        row.by_seeds[p, f] = {key: rng.uniform(10, 40) for key in METRICS}
                    if p is not None:
                        row.costs[p] = Cost(30.5 + p, 900.0 - p, None)
                row.wanted = len(row.by_seeds)
                rows.append(row)
    return rows


def write(path, rows, name="s"):
    path.write_text(results_csv(rows, name))
    return str(path)


def test_rows_are_read_back(tmp_path):
    rows = rows_of()
    rows[1].by_seeds[0, 1]["segm/AP75"] = None
    assert read_csv(write(tmp_path / "a.csv", rows)) == rows
    first, *others = (tmp_path / "a.csv").read_text().splitlines()
    assert first == (
        "sweep,initialisation,pretrain_seed,finetune_seed,label,method,finetune,labels,"
        "label_fraction,checkpoint,images_seen,learning_rate,test_data,planned,machine,box_ap,"
        "box_ap50,box_ap75,mask_ap,mask_ap50,mask_ap75,images_per_second,memory_mib,minutes"
    )
    # Files of earlier versions do not name test data or machine; spreadsheets begin with a mark.
    earlier = [",".join(line.split(",")[:12] + line.split(",")[15:]) for line in (first, *others)]
    (tmp_path / "b.csv").write_text("\n".join(earlier), encoding="utf-8-sig")
    assert "test_data" not in earlier[0] and read_csv(str(tmp_path / "b.csv")) == rows
    for row in rows:
        row.test_data = f"shapes(split=val, size={row.labels})"
    assert read_csv(write(tmp_path / "a.csv", rows)) == rows
    for row in rows:
        row.wanted += 3
        values = row.by_seeds.items()
        row.by_seeds = {(*seeds, f"CPU {seeds[1]}, PyTorch 2"): found for seeds, found in values}
    assert read_csv(write(tmp_path / "a.csv", rows)) == rows
    rows[1].checkpoint = 400
    assert read_csv(write(tmp_path / "a.csv", rows))[1].checkpoint == 400
    assert rows[1].cost == Cost(31.5, 900.0, None)


def test_mistakes_in_a_file_are_named(tmp_path):
    path = tmp_path / "a.csv"
    with pytest.raises(UserError, match="there is no .*a.csv"):
        read_csv(str(path))
    text = results_csv(rows_of(), "s")
    path.write_text(text.replace("mask_ap50", "mask"))
    with pytest.raises(UserError, match="a.csv has no column mask_ap50"):
        read_csv(str(path))
    lines = text.splitlines(True)
    path.write_text("".join([*lines[:3], lines[2]]))
    with pytest.raises(UserError, match=r"line 4: a second line of s random .*\(None, 1\)"):
        read_csv(str(path))
    path.write_text("".join([lines[0], lines[1].replace(",0,", ",zero,", 1)]))
    with pytest.raises(UserError, match="line 2: .*zero"):
        read_csv(str(path))
    path.write_text(text.replace("SoCo", "SoCö"), encoding="latin-1")
    with pytest.raises(UserError, match="a.csv is not UTF-8 text: save it as CSV in UTF-8"):
        read_csv(str(path))
    path.write_text(lines[0] + '"' + "x" * 200_000)
    with pytest.raises(UserError, match="a.csv is not a CSV file: field larger than"):
        read_csv(str(path))
    path.write_text(text)
    with pytest.raises(UserError, match=r"cannot write to the output folder .*File exists"):
        write_tables(str(path), [], str(path))


def cells(value, base):
    """A cell of the table of differences: effects of both seeds, by analysis of variance."""
    gains = value - base
    pretrain, finetune = (3 * gains.mean(axis).var(ddof=1) for axis in (1, 0))
    rest = gains - gains.mean(1, keepdims=True) - gains.mean(0, keepdims=True) + gains.mean()
    residual = (rest**2).sum() / 4
    pooled = gains.var(ddof=1)  # where no effect of a seed is seen
    total = max(pretrain + finetune - residual, pretrain, finetune, pooled)
    spread = pretrain**2 / 2 + finetune**2 / 2 + residual**2 / 4
    freedom = {pretrain: 2, finetune: 2, pooled: 8}.get(total, total**2 / spread)
    error = (total / 9) ** 0.5
    low, high = stats.t.interval(0.95, freedom, gains.mean(), error)
    return f"{gains.mean():+.1f} ± {error:.1f} [{low:+.1f}, {high:+.1f}]"


def test_tables_and_figures_by_one_command(tmp_path):
    rows = rows_of()
    path = write(tmp_path / "long.csv", rows)
    references = ["--reference", "random", "--reference", "moco"]
    done = run_tool("sweep.py", "tables", path, "--out", tmp_path / "out", *references)
    assert done.returncode == 0, done.stderr
    kinds = "labels", "runs_0.25", "runs_1"
    names = [f"long_{kind}_{task}_ap.png" for kind in kinds for task in ("box", "mask")]
    names.insert(0, "long.md")
    assert done.stdout.split() == [str(tmp_path / "out" / name) for name in names]
    for name in names[1:]:
        with Image.open(tmp_path / "out" / name) as image:
            assert image.size == (960, 600) and np.asarray(image).std() > 10
    text = (tmp_path / "out/long.md").read_text()
    assert re.findall(r"\]\((.*?)\)", text) == names[1:]
    found = [re.sub(r"^\| | \|$", "", line).split(" | ") for line in text.splitlines()]

    def table(row, key):
        values = list(row.values(key).values())
        return np.reshape(values, (-1, 3))  # one line for random weights

    for labels in (25, 100):
        random, moco, soco = (r for r in rows if r.labels == labels)
        for row in (random, moco, soco):
            aps = table(row, "segm/AP").ravel()
            start = [row.label, f"{labels} %", f"{len(aps)}", "0.05"]
            (line,) = (cell for cell in found if cell[:4] == start)
            assert line[7] == f"{aps.mean():.1f} ± {aps.std(ddof=1):.1f}"
        lines = [cell for cell in found if cell[:3] == ["SoCo", f"{labels} %", "9"]]
        for line, base in zip(lines[-2:], (random, moco), strict=True):
            expected = [cells(table(soco, key), table(base, key)) for key in METRICS]
            assert line[3:] == expected
    with pytest.raises(UserError, match="no initialisation is called byol: choose from random, "):
        tables(rows, {}, ["byol"])


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("s,soco,2,2,", "other,soco,2,2,", "sweep other, but the lines before are of s: make"),
        (",0.05,", ",0.1,", "learning_rate 0.1, but 0.05 in an earlier line of s soco det 1.0"),
        (",val,", ",test,", "test_data test, but val in an earlier line of s soco det 1.0 final"),
        (",100,1.0,", ",25,1.0,", "labels 25, but 100 in an earlier line"),
        ("val,9,A,", "val,9,A,nan", "nan.* is not finite: leave the value"),
        ("soco,2,2,", "soco,2,1,", r"a second line of s soco det 1.0 final with seeds \(2, 1\)"),
    ],
)
def test_lines_that_do_not_belong_together(tmp_path, old, new, message):
    rows = rows_of(counts=(100,))
    for row in rows:
        row.test_data = "val"
        row.by_seeds = {(*seeds, "A"): values for seeds, values in row.by_seeds.items()}
    path = Path(write(tmp_path / "a.csv", rows))
    *lines, last = path.read_text().splitlines()
    assert old in last
    replaced = last.replace(old, new, 1)
    if "nan" in new:
        replaced = re.sub(r"nan[\d.]+", "nan", replaced)
    path.write_text("\n".join([*lines, replaced]) + "\n")
    with pytest.raises(UserError, match=rf"a\.csv, line 22: {message}"):
        read_csv(str(path))


def test_a_baseline_on_two_machines(tmp_path):
    """Each run is compared with the baseline's on its own machine."""
    random, _, soco = rows_of(counts=(100,))

    def runs(row, values):
        keys = METRICS.keys()
        row.by_seeds = {seeds: dict.fromkeys(keys, value) for seeds, value in values.items()}
        row.wanted = len(values)

    runs(random, {(None, f, m): 10.0 * f + (m == "B") for f in (0, 1) for m in "AB"})
    runs(soco, {(p, f, "AB"[p]): 10.0 * f + 5 + p for p in (0, 1) for f in (0, 1)})
    path = write(tmp_path / "a.csv", [random, soco])
    results, differences = tables(read_csv(path), {}, ["random"])
    assert results.rows[0][1] == "4" and results.rows[1][1] == "4"
    assert differences.rows == [["SoCo", "4", *["+5.0 ± 0.0 [+5.0, +5.0]"] * 6]]
    assert "two machines" not in differences.caption
    runs(soco, {(p, f, "AC"[p]): 10.0 * f + 5 + p for p in (0, 1) for f in (0, 1)})
    caption = tables([random, soco], {}, ["random"])[1].caption
    assert caption.endswith("pairs of two machines: 2 of SoCo.")
    soco.test_data = "val"
    assert len(tables([random, soco], {}, ["random"])) == 2  # unknown in earlier files
    random.test_data = "other"
    assert len(tables([random, soco], {}, ["random"])) == 1


def test_missing_runs_are_counted_from_the_file_alone(tmp_path):
    path = Path(write(tmp_path / "a.csv", rows_of(counts=(100,))))
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    results, differences = tables(read_csv(str(path)), {}, ["random"])
    assert [line[1] for line in results.rows] == ["3", "9", "8/9"]
    assert [line[1] for line in differences.rows] == ["9", "8/9"]
    assert "[" in differences.rows[1][2]


def test_a_file_that_was_cut_is_named(tmp_path):
    path = write(tmp_path / "a.csv", rows_of())
    text = Path(path).read_text()
    Path(path).write_text(text[: len(text) - 40])
    with pytest.raises(UserError, match=r"a\.csv, line 43: a line has not as many"):
        read_csv(path)


def test_ap_against_labels():
    rows = [row for row in rows_of() if (row.init, row.labels) != ("soco", 25)]
    for row in rows:
        aps = (10.0, 20.0, 30.0) if row.labels == 25 else (40.0, 40.0, 40.0)
        row.by_seeds = {
            (p, f): {**values, "bbox/AP": aps[f]} for (p, f), values in row.by_seeds.items()
        }
    box, mask = (t for t in tables(rows, {}) if "By number" in t.caption)
    assert box.caption.startswith("By number of labelled images: box AP, mean")
    assert box.header == ["initialisation", "25", "100"]
    assert box.rows == [
        ["random weights", "20.0 ± 10.0", "40.0 ± 0.0"],
        ["MoCo v2", "20.0 ± 8.7", "40.0 ± 0.0"],  # 9 values, each of the three three times
        ["SoCo", "–", "40.0 ± 0.0"],
    ]
    assert mask.header == box.header and mask.rows != box.rows
    for row in rows:
        row.finetune, row.label_fraction = f"det{row.labels}", 1.0
    assert [t for t in tables(rows, {}) if "By number" in t.caption] == [box, mask]
    for row in rows:
        row.test_data = "coco_2017_val" if row.labels == 100 else "voc_2007_test"
    assert not [t for t in tables(rows, {}) if "labelled images" in t.caption.lower()]
    assert not [figure for figure in figures(rows) if figure.name.startswith("labels")]


def test_worth_in_labels():
    rows = rows_of(counts=(25, 100, 400))
    aps = {"random": (10, 20, 40), "moco": (9, 40, 41), "soco": (15, 35, None)}
    for row in rows:
        at = (25, 100, 400).index(row.labels)
        row.by_seeds = {
            seeds: {**values, "bbox/AP": aps[row.init][at]}
            for seeds, values in row.by_seeds.items()
        }
    (box,) = (t for t in tables(rows, {}) if "same box AP" in t.caption)
    assert "random weights would need" in box.caption
    assert box.header == ["initialisation", "25", "100", "400"]
    # Half of the way from 25 to 100 labels is 50, three quarters from 100 to 400 are 283.
    assert box.rows == [
        ["MoCo v2", "< 25", "400 (4.0 x)", "> 400 (> 1.0 x)"],
        ["SoCo", "50 (2.0 x)", "283 (2.8 x)", "–"],
    ]
    assert not [t for t in tables(rows, {}, brief=True) if "same box AP" in t.caption]
    assert not [t for t in tables(rows_of(counts=(100,)), {}) if "would need" in t.caption]
    assert len([t for t in tables(rows, {}, ["random", "moco"]) if "would need" in t.caption]) == 4


def test_figures_follow_what_the_sweep_varies():
    def names(rows):
        return [figure.name for figure in figures(rows)]

    both = ["box_ap", "mask_ap"]
    one = rows_of(counts=(100,))
    assert names(one) == [f"runs_{task}" for task in both]
    for row in one:  # a single seed
        row.by_seeds = dict(list(row.by_seeds.items())[:1])
    assert names(one) == []
    kinds = "labels", "runs_0.25", "runs_1"
    assert names(rows_of()) == [f"{kind}_{task}" for kind in kinds for task in both]
    lengths = rows_of(counts=(100,), lengths=(32, 64))
    assert names(lengths) == [f"images_{task}" for task in both]
    fractions = rows_of(lengths=(32, 64))
    assert names(fractions) == [
        *(f"labels_{task}" for task in both),
        *(f"images_{fraction}_{task}" for fraction in ("0.25", "1") for task in both),
    ]
    # Fine-tunings that differ in their labels, e.g. in order to differ in length, share a figure.
    rows = rows_of()
    for row in rows:
        row.finetune, row.label_fraction = f"det{row.labels}", 1.0
    kinds = "runs_det25", "runs_det100"
    runs = [f"{kind}_{task}" for kind in kinds for task in both]
    assert names(rows) == [*(f"labels_{task}" for task in both), *runs]
    for row in rows:
        row.labels = 25
    assert names(rows) == runs


def test_curves_of_the_figures(monkeypatch):
    drawn = []

    def draw(curves, x_label, y_label, errors, log_x):
        drawn.append((curves, x_label, y_label, errors))
        return b""

    monkeypatch.setattr("region_pretrain.sweeps.figures.plot_curves", draw)
    rows = rows_of()
    rows[0].by_seeds[None, 0]["bbox/AP"] = None
    figures(rows)
    curves, x_label, y_label, errors = drawn[0]
    assert (x_label, y_label) == ("labelled images", "box AP (%)")
    soco = [row.statistics("bbox/AP") for row in rows if row.init == "soco"]
    assert curves["SoCo"] == ([25, 100], [value["mean"] for value in soco])
    assert errors["SoCo"] == [value["std"] for value in soco]
    assert curves["random weights"] == ([100], [rows[3].statistics("bbox/AP")["mean"]])
    drawn.clear()
    rows = rows_of(counts=(100,), lengths=(64, 32))
    figures(rows)
    curves, x_label, _, errors = drawn[0]
    assert x_label == "images seen in pre-training"
    assert errors["random weights"] == [rows[0].statistics("bbox/AP")["std"]] * 2
    flat = rows[0].statistics("bbox/AP")["mean"]
    assert list(curves) == list(METHODS.values())
    assert curves["random weights"] == ([352, 384], [flat, flat])
    means = {r.images_seen: r.statistics("bbox/AP")["mean"] for r in rows if r.method == "SoCo"}
    assert curves["SoCo"] == ([352, 384], [means[352], means[384]])
    # Against minutes as well, once all of them are known: methods differ in their cost per image.
    trained = [row for row in rows if row.images_seen]
    drawn.clear()
    for row in trained:
        row.costs = {0: Cost(minutes=row.images_seen * (1 if row.method == "SoCo" else 4))}
    figures(rows)
    assert [x_label for _, x_label, *_ in drawn] == [
        *["images seen in pre-training"] * 2,
        *["minutes of pre-training"] * 2,
    ]
    curves, *_ = drawn[2]
    assert curves["SoCo"] == ([352, 384], [means[352], means[384]])
    assert curves["MoCo v2"][0] == [4 * 352, 4 * 384]
    assert curves["random weights"][0] == [352, 4 * 384]
    drawn.clear()
    trained[0].costs = {}
    figures(rows)
    assert len(drawn) == 2


def test_labels_and_images_seen_of_the_runs(sweeps, tmp_path):
    """The images of chains are added up; both are read from the configs that the runs wrote."""
    folders = {}

    def add(name, kind, *parents, **labels):
        sweeps.add(name, *parents)
        run = sweeps.plan.runs[name]
        folders[name] = Path(run.folder)
        folders[name].mkdir(parents=True)
        product = str(folders[name] / "results.json")
        sweeps.plan.runs[name] = Run(**{**run.__dict__, "kind": kind, "product": product})
        sweeps.plan.entries.append({"kind": kind, "run": name, "seed": 0, **labels})

    how = {"finetune": "det", "label_fraction": 1.0, "checkpoint": "final"}
    add("first", PRETRAIN, init="first")
    add("second", PRETRAIN, "first", init="second")
    add("det_random", FINETUNE, init="random", **how)
    for name in ("first", "second"):
        add(f"det_{name}", FINETUNE, name, init=name, pretrain_seed=0, **how)
    add("det_early", FINETUNE, "second", init="second", pretrain_seed=0, **how | {"checkpoint": 3})
    for name, folder in folders.items():
        (folder / "results.json").write_text('{"bbox": {"AP": 5.0}}')
        data = "    total_batch_size: 8\n"
        if name.startswith("det"):
            data += "    dataset: {_target_: builtins.dict, a: 1, b: 2, c: 3}\n"
        text = f"dataloader:\n  train:\n{data}optimizer: {{lr: 0.1}}\ntrain: {{register: []}}\n"
        (folder / "config.yaml").write_text(text)
    write_progress(f"{folders['first']}/progress.json", Progress(10, 10))
    write_progress(f"{folders['second']}/progress.json", Progress(4, 4))
    subset = '{"image_ids": [3, 4, 5, 6, 7]}'
    (folders["det_first"] / "labelled_images.json").write_text(subset)
    file = sweeps.file()
    file.labels = {"random": "random", "first": "First", "second": "Second"}
    found = {(row.init, row.checkpoint): row for row in collect(file)}
    seen = {key: row.images_seen for key, row in found.items()}
    assert seen == {
        ("random", "final"): 0,
        ("first", "final"): 80,
        ("second", 3): 80 + 24,
        ("second", "final"): 80 + 32,
    }
    assert found["first", "final"].labels == 5
    assert found["random", "final"].labels == found["second", 3].labels == 3
    assert list(found["second", 3].by_seeds) == [(0, 0)]
    assert list(found["random", "final"].by_seeds) == [(None, 0)]
