"""The report of a sweep: compared with the files of its runs, and rendered by a browser."""

import csv
import html
import json
import os
import re
import shutil
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from forked import LONG
from PIL import Image
from report_folder import LABELS, METRICS, TASKS, Folder
from scipy import stats

from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import report, state
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN, Plan, Run
from region_pretrain.sweeps.report import results_text, write_sweep_report
from region_pretrain.sweeps.results import collect, mean_curve, step_minutes
from region_pretrain.sweeps.tables import tables

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = Folder(tmp_path_factory.mktemp("sweep"))
    made.paths = write_sweep_report(str(made.root))
    return made


def mean_std(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def expected(folder):
    """The main table, from the numbers that were written into the runs."""
    rows = []
    for fraction in (1.0, 0.1):
        for init, label in LABELS.items():
            found = folder.values[init, fraction]
            cells = [label, f"{100 * fraction:g} %", "2" if len(found) == 2 else "1/2", "0.1"]
            cells += [mean_std([f[task][m] for f in found]) for task in TASKS for m in METRICS]
            cost = folder.values.get(("cost", init))
            if cost is None:
                cells += ["–"] * 3
            else:
                minutes = [sum(2 * 32 / s for s in c["speed"]) / 60 for c in cost]
                cells.append(f"{np.mean([np.median(c['speed']) for c in cost]):.0f}")
                cells.append(f"{max(max(c['memory']) for c in cost):.0f}")
                cells.append(f"{np.mean(minutes):.1f}")
            rows.append(cells)
    return rows


def paired(values, base):
    """Mean, standard error and interval of the paired t test."""
    gains = np.subtract(values, base)
    if len(gains) == 1:
        return f"{gains[0]:+.1f}"
    low, high = stats.ttest_rel(values, base).confidence_interval(0.95)
    return f"{gains.mean():+.1f} ± {stats.sem(gains):.1f} [{low:+.1f}, {high:+.1f}]"


def expected_differences(folder):
    """Paired over the seeds: those of ``zip``, as unfinished runs are the last ones."""
    rows = []
    for fraction in (1.0, 0.1):
        for init in ("soco", "mcl"):
            pairs = list(
                zip(folder.values[init, fraction], folder.values["random", fraction], strict=False)
            )
            n = f"{len(pairs)}" if len(pairs) == 2 else f"{len(pairs)}/2"
            cells = [LABELS[init], f"{100 * fraction:g} %", n]
            for task in TASKS:
                for m in METRICS:
                    cells.append(
                        paired([a[task][m] for a, _ in pairs], [b[task][m] for _, b in pairs])
                    )
            rows.append(cells)
    return rows


def cells(page, number=0):
    """Rows of one of the page's tables as text."""
    table = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)[number]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_tables_of_page_and_markdown(folder):
    page, markdown = (open(path, encoding="utf-8").read() for path in folder.paths[:2])
    header, *rows = cells(page)
    assert header[:6] == ["initialisation", "labels", "n", "learning rate", "box AP", "box AP50"]
    assert header[-3:] == ["img/s", "peak MiB", "min"]
    assert rows == expected(folder)
    header, *differences = cells(page, 1)
    assert header[:4] == ["initialisation", "labels", "n", "box AP"] and len(header) == 9
    assert differences == expected_differences(folder)
    assert "Difference from random weights: " in page
    header, *probes = cells(page, 2)
    assert header == ["pre-training", "kNN, FPN", "probe/other"]
    first, last = ([100 * p[at] for p in folder.values["probes"]] for at in (0, 1))
    values = f"{mean_std(first)} → {mean_std(last)}"
    assert probes == [["SoCo <&>", values, "25.0 ± 0.0 → 25.0 ± 0.0"]]
    for row in rows + differences + probes:
        assert f"| {' | '.join(row)} |" in markdown
    header, first, *_ = cells(page, 3)
    assert header == ["initialisation", "labels", "learning rate 0.05", "learning rate 0.1"]
    assert first == ["random weights", "100 %", "3.2", "4.6 (chosen)"]
    assert "Every pre-training sees 320 images" in page
    # 2 label fractions x (box, mask), as curves and with all runs, and the losses of two methods
    assert page.count("data:image/png;base64,") == 2 * 2 * 2 + 2
    assert not re.search(r'(src|href)="https?:', page)


def test_text_has_the_main_columns(folder):
    def words(cells):
        return " ".join(cells).split()

    lines = [line.split() for line in results_text(str(folder.root)).splitlines()]
    for row in expected(folder):
        assert words(row[:6] + row[7:9]) in lines  # without AP75 and cost
    for row in expected_differences(folder):
        assert words(row[:5] + row[6:8]) in lines
    assert not any("AP75" in line or "img/s" in line for line in lines)


def test_an_undefined_ap_stays_undefined(folder):
    rows = collect(state.read_sweep(str(folder.root)))
    (row,) = (r for r in rows if (r.init, r.label_fraction) == ("soco", 1.0))
    path = Path(folder.plan.runs["det_soco_1.0_1"].product)
    before = path.read_text()
    path.write_text(json.dumps({"segm": json.loads(before)["segm"]}))  # found nothing at all
    try:
        (undefined,) = (
            r
            for r in collect(state.read_sweep(str(folder.root)))
            if (r.init, r.label_fraction) == ("soco", 1.0)
        )
    finally:
        path.write_text(before)
    assert undefined.statistics("bbox/AP") == {"mean": None, "std": None}
    assert undefined.statistics("segm/AP") == row.statistics("segm/AP")
    random = next(r for r in rows if (r.init, r.label_fraction) == ("random", 1.0))
    results, differences = (table.rows[-1] for table in tables([random, undefined], {})[:2])
    assert results[3] == differences[2] == "–" and differences[1] == "2"


def test_pictures_that_cannot_be_drawn_are_named(folder):
    page = open(folder.paths[0], encoding="utf-8").read()
    for init in ("soco", "mcl"):
        missing = folder.root / "runs" / f"{init}_0" / "config.yaml"
        text = f"No picture for “Views of {LABELS[init]}” ({init}_0): no config file {missing}"
        assert f"<p>{html.escape(text)}</p>" in page
    assert "No picture for “ground truth” (det_random_1.0_0): " in page
    assert page.count("No picture for “MCL” (det_mcl_1.0_0): ") == 1
    assert not (folder.root / "pictures").exists()


def test_csv_has_a_line_per_fine_tuning_with_all_digits(folder):
    with open(folder.paths[2], encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    seeds = [(0, 1) for _ in range(5)] + [(0,)]  # the last one is not finished
    rows = zip([(init, f) for f in (1.0, 0.1) for init in LABELS], seeds, strict=True)
    wanted = [(init, fraction, seed) for (init, fraction), mine in rows for seed in mine]
    for line, (init, fraction, seed) in zip(lines, wanted, strict=True):
        found = folder.values[init, fraction][seed]
        for task, name in (("bbox", "box"), ("segm", "mask")):
            for metric in METRICS:
                assert float(line[f"{name}_{metric.lower()}"]) == found[task][metric]
        about = ("sweep", "initialisation", "label", "finetune", "checkpoint", "learning_rate")
        assert [line[k] for k in about] == ["s", init, LABELS[init], "det", "final", "0.1"]
        assert (float(line["label_fraction"]), line["finetune_seed"]) == (fraction, str(seed))
        assert line["pretrain_seed"] == ("" if init == "random" else str(seed))
        if init == "random":
            assert (line["images_seen"], line["minutes"]) == ("0", "")
        else:
            cost = folder.values["cost", init][seed]
            assert float(line["images_per_second"]) == pytest.approx(np.median(cost["speed"]))
            assert float(line["memory_mib"]) == pytest.approx(max(cost["memory"]))


def test_the_report_of_a_folder_that_was_moved(tmp_path):
    (tmp_path / "before").mkdir()
    Folder(tmp_path / "before")
    *_, csv = write_sweep_report(str(tmp_path / "before"))
    before = Path(csv).read_text()
    (tmp_path / "before").rename(tmp_path / "after")
    *_, csv = write_sweep_report(str(tmp_path / "after"))
    assert Path(csv).read_text() == before and before.count("\n") > 10
    assert not (tmp_path / "before").exists()


def test_what_runs_of_a_moved_sweep_read_is_in_its_folder(tmp_path):
    old, new, file = tmp_path / "before", tmp_path / "after", "model_final.pth"
    made = Folder.__new__(Folder)
    made.root, made.plan = old, Plan()
    made.run("pre", PRETRAIN, file, init="soco", seed=0)
    folder = made.run("det", FINETUNE, "results.json", init="soco", seed=0)
    task = ("--config-file", "c.py", f"train.init_checkpoint={old}/runs/pre/{file}", f"x=/y{old}/z")
    made.plan.runs["det"] = replace(made.plan.runs["det"], tasks=(task,))
    code, copies = f"{old}/code/1", {"c.py": f"{old}/configs/c-1.py"}
    cluster = Cluster(kind="local")
    sweep = state.SweepFile("s", "S", "", cluster, code, "/", {}, 8, made.plan, configs=copies)
    folder.mkdir(parents=True)
    state.write_sweep(str(old), sweep)
    old.rename(new)
    found = state.read_sweep(str(new))
    (task,) = found.plan.runs["det"].tasks
    assert task[2:] == (f"train.init_checkpoint={new}/runs/pre/{file}", f"x=/y{old}/z")
    assert found.plan.runs["det"].product == f"{new}/runs/det/results.json"
    assert (found.root, found.configs) == (f"{new}/code/1", {"c.py": f"{new}/configs/c-1.py"})


def test_failure_and_runs(folder):
    page = open(folder.paths[0], encoding="utf-8").read()
    assert "det_mcl_0.1_1 failed" in page
    assert (
        "iter 1/2\nRuntimeError: the disk &lt;melted&gt;</pre>" in page
    )  # without submitit's lines
    assert "Failed: det_mcl_0.1_1." in open(folder.paths[1], encoding="utf-8").read()
    header, *rows = cells(page, 4)
    assert header == ["run", "state", "progress", "attempts", "min", "log"]
    states = {row[0]: row[1] for row in rows}
    assert states.pop("det_mcl_0.1_1") == "failed" and set(states.values()) == {"finished"}
    for href in re.findall(r'href="(.*?)"', page):
        assert (folder.root / href).exists()
    assert 'href="jobs/12_0_log.out"' in page


def test_pictures_of_several_fine_tunings_are_told_apart(folder):
    sweep = state.read_sweep(str(folder.root))
    assert "det: box AP" not in str(report._ap_curves(collect(sweep)))
    others = [entry for entry in sweep.plan.entries if "finetune" in entry]
    sweep.plan.entries += [{**entry, "finetune": "frozen"} for entry in others]
    page = str(report._ap_curves(collect(sweep)))
    for name in ("det", "frozen"):
        for fraction in ("100", "10"):
            assert page.count(f">{name}: box AP, {fraction} % of the labels, mean over") == 1
    page = str(report.SweepPictures(sweep, str(folder.root)).detections())
    assert page.index("<p>det:</p>") < page.index("<p>frozen:</p>")


def test_runs_that_are_missing_are_counted(folder):
    rows = [row for row in collect(state.read_sweep(str(folder.root))) if row.label_fraction == 1]
    random, soco, _ = rows
    whole = tables([random, soco], {})[1].rows[0]
    assert whole[1] == "2" and "[" in whole[2]
    for row in (random, soco):  # of either of the two
        row.wanted = 3
        n, box = tables([random, soco], {})[1].rows[0][1:3]
        assert n == "2/3" and box == whole[2]
        row.wanted = 2


def test_costs_and_curves_are_those_of_finished_runs(folder):
    sweep = state.read_sweep(str(folder.root))
    product = Path(folder.plan.runs["soco_1"].product)
    log = Path(folder.plan.runs["det_soco_1.0_1"].folder, "metrics.json")
    product.rename(product.with_suffix(".away"))
    lines = log.read_text()
    log.write_text('{"iteration": 0, "total_loss": 1.0}\n')  # it has no AP yet
    try:
        row = next(row for row in collect(sweep) if row.init == "soco")
    finally:
        product.with_suffix(".away").rename(product)
        log.write_text(lines)
    assert list(row.costs) == [0]
    first = folder.values["soco", 1.0][0]["bbox"]["AP"]
    assert row.curves["bbox/AP"] == ([5, 10], [first / 2, first])


def test_single_evaluations_are_no_curves(folder):
    rows = collect(state.read_sweep(str(folder.root)))
    assert len(report._ap_curves(rows)) == 2  # label fractions
    for row in rows:
        row.curves = {key: (x[-1:], y[-1:]) for key, (x, y) in row.curves.items()}
    assert report._ap_curves(rows) == []


def test_means_of_curves_and_minutes_of_steps():
    points, values = mean_curve([([5, 10], [1.0, 4.0]), ([5, 10, 15], [3.0, 8.0, 1.0])])
    assert (points, values) == ([5, 10], [2.0, 6.0])
    assert mean_curve([]) == ([], [])
    rows = [
        {"iteration": 9, "time": 6.0},
        {"iteration": 14, "bbox/AP": 1.0},
        {"iteration": 19, "time": 3.0},
    ]
    assert step_minutes(rows) == (10 * 6 + 10 * 3) / 60


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium")
def test_in_a_browser(folder, tmp_path):
    def chromium(*arguments):
        command = [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--window-size=1400,1800",
        ]
        command += [f"--user-data-dir={tmp_path / 'profile'}", *arguments]
        done = subprocess.run(
            [*command, f"file://{folder.paths[0]}"], capture_output=True, text=True, timeout=LONG
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    dom = chromium("--dump-dom")
    assert cells(dom)[1:] == expected(folder)
    picture = tmp_path / "page.png"
    chromium(f"--screenshot={picture}")
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (1800, 1400, 3)
    coloured = (pixels.max(2) - pixels.min(2) > 80).any(1)  # curves; text is grey
    assert coloured.sum() > 50
    assert np.nonzero(pixels.std((1, 2)) > 0)[0].min() < 100  # a heading on top


def test_a_finished_run_that_is_still_ending_counts(tmp_path):
    # The report is written once the last product exists; its process then records its end.
    plan, sweep = Plan(), tmp_path / "sweep"
    runs = sweep / "runs"
    for name, started, ended in (("early", 1000.0, 1060.0), ("late", 1060.0, 1180.0)):
        run = Run(name, PRETRAIN, name, "t.py", ((),), str(runs / name), str(runs / name / "x"))
        plan.runs[name] = run
        plan.entries.append({"kind": PRETRAIN, "init": name, "seed": 0, "run": name})
        (runs / name).mkdir(parents=True)
        (runs / name / "x").touch()
        os.utime(runs / name / "x", (ended, ended))
        attempt = {"job": "1", "restart": 0, "host": "h", "started": started, "start": ""}
        if name == "early":
            attempt |= {"ended": ended, "stop": "", "outcome": "finished"}
        (runs / name / "attempts.json").write_text(json.dumps([attempt]))
    (sweep / "jobs").mkdir()
    labels = {"early": "Early", "late": "Late"}
    cluster = Cluster(kind="local")
    state.write_sweep(
        str(sweep), state.SweepFile("s", "S", "c", cluster, "/", "/", labels, None, plan)
    )
    page, markdown, _ = (Path(path).read_text() for path in write_sweep_report(str(sweep)))
    for text in (page, markdown):
        assert "2 finished. At least one run was running for 3.0 minutes." in text
    cells = re.findall(r"<tr><td>(?:<a[^>]*>)?(early|late)\b.*?</tr>", page)
    rows = {c: re.search(rf">{c}(?:</a>)?</td>.*?</tr>", page, re.S)[0] for c in cells}
    minutes = {c: re.findall(r"<td[^>]*>([\d.]+)</td>", row)[-1] for c, row in rows.items()}
    assert {c: float(m) for c, m in minutes.items()} == {"early": 1.0, "late": 2.0}


def test_runs_link_to_their_pages_at_the_trackers(folder):
    sweep = state.read_sweep(str(folder.root))
    first, second = list(sweep.plan.runs.values())[:2]
    now = dict.fromkeys(sweep.plan.runs, "finished")
    url = "https://host/team/project/runs/12?a=1&b=2"
    for run, content in ((first, {"id": "12", "url": url}), (second, {"id": "34", "url": None})):
        Path(run.folder, "wandb_run.json").write_text(json.dumps(content))
    try:
        page = report._runs_table(sweep, str(folder.root), now)
    finally:
        for run in (first, second):
            os.remove(os.path.join(run.folder, "wandb_run.json"))
    header, *rows = cells(page)
    assert header[-2:] == ["log", "Weights & Biases"]
    assert [row[-1] for row in rows] == ["page", "34"] + ["–"] * (len(rows) - 2)
    assert f'<a href="{html.escape(url)}">page</a>' in page
