"""The report of a sweep against the files of its runs, and as a browser shows it."""

import csv
import html
import json
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from region_pretrain.jobs.attempts import end_attempt, start_attempt
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import state
from region_pretrain.sweeps.graph import CHOICE, FINETUNE, PRETRAIN, TRIAL, Plan, Run
from region_pretrain.sweeps.report import write_sweep_report
from region_pretrain.sweeps.results import mean_curve, step_minutes

LABELS = {"random": "random weights", "soco": "SoCo <&>", "mcl": "MCL"}
TASKS, METRICS = ("bbox", "segm"), ("AP", "AP50", "AP75")
CHROMIUM = shutil.which("chromium")


class Folder:
    """A sweep's folder, half of it done."""

    def __init__(self, root) -> None:
        self.root, self.plan, self.rng = root, Plan(), np.random.default_rng(0)
        self.values: dict[tuple, list[dict]] = {}
        for start in ("soco", "mcl"):
            for seed in (0, 1):
                self.pretrain(start, seed)
        for start in LABELS:
            for fraction in (1.0, 0.1):
                labels = {"init": start, "finetune": "det", "label_fraction": fraction}
                labels["checkpoint"] = "final"
                self.choice(labels)
                for seed in (0, 1):
                    self.finetune(labels, seed)
        (root / "jobs").mkdir()
        failed = self.plan.runs["det_mcl_0.1_1"]
        log = root / "jobs/12_0_log.out"
        log.write_text("iter 1/2\nRuntimeError: the disk <melted>\nsubmitit ERROR (x)\nTraceback\n")
        state.write_record(failed, state.Record(2, ["12"], [str(log)]))
        sweep = state.SweepFile(
            "s", "A sweep", "python tools/sweep.py --config s.py", Cluster(kind="local"),
            "/", "/", LABELS, 320, self.plan,
        )  # fmt: skip
        state.write_sweep(str(root), sweep)

    def run(self, name, kind, product, **labels):
        folder = self.root / "runs" / name
        run = Run(name, kind, name, "t.py", ((),), str(folder), str(folder / product))
        self.plan.runs[name] = run
        self.plan.entries.append({"kind": kind, **labels, "run": name})
        return folder

    def write(self, folder, rows):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def pretrain(self, start, seed):
        folder = self.run(f"{start}_{seed}", PRETRAIN, "model_final.pth", init=start, seed=seed)
        speed, memory = self.rng.uniform(10, 90, 5), self.rng.uniform(500, 900, 5)
        steps = zip(range(1, 10, 2), speed, memory, strict=True)
        rows = [
            {
                "iteration": i,
                "time": 32 / s,
                "img_per_sec": s,
                "peak_memory_mib": m,
                "total_loss": s,
            }
            for i, s, m in steps
        ]
        self.write(folder, rows)
        (folder / "model_final.pth").touch()
        self.values.setdefault(("cost", start), []).append({"speed": speed, "memory": memory})

    def choice(self, labels):
        name = f"{labels['init']}_{labels['label_fraction']}"
        for rate, ap in ((0.05, 3.21), (0.1, 4.56)):
            folder = self.run(f"{name}_{rate}", TRIAL, "results.json", **labels, learning_rate=rate)
            self.plan.entries[-1]["metric"] = "bbox/AP"
            folder.mkdir(parents=True)
            (folder / "results.json").write_text(json.dumps({"bbox": {"AP": ap}}))
        folder = self.run(f"{name}_choice", CHOICE, "chosen_rate.txt", **labels)
        folder.mkdir()
        (folder / "chosen_rate.txt").write_text("optimizer.lr=0.1\n")

    def finetune(self, labels, seed):
        name = f"det_{labels['init']}_{labels['label_fraction']}_{seed}"
        folder = self.run(name, FINETUNE, "results.json", **labels, seed=seed)
        if name == "det_mcl_0.1_1":
            return
        found = {t: {m: self.rng.uniform(0, 60) for m in METRICS} for t in TASKS}
        points = [{f"{t}/{m}": v * x for t in TASKS for m, v in found[t].items()} for x in (0.5, 1)]
        rows = [{"iteration": i, **p} for i, p in zip((4, 9), points, strict=True)]
        self.write(folder, rows)
        start_attempt(str(folder), "7", 0, "host")
        end_attempt(str(folder), "finished")
        (folder / "results.json").write_text(json.dumps(found))
        self.values.setdefault((labels["init"], labels["label_fraction"]), []).append(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = Folder(tmp_path_factory.mktemp("sweep"))
    made.paths = write_sweep_report(str(made.root))
    return made


def expected(folder):
    """The main table, from the numbers that were written into the runs."""
    rows = []
    for fraction in (1.0, 0.1):
        for start, label in LABELS.items():
            found = folder.values[start, fraction]
            cells = [label, f"{100 * fraction:g} %", "2" if len(found) == 2 else "1/2", "0.1"]
            for task in TASKS:
                for metric in METRICS:
                    values = [f[task][metric] for f in found]
                    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
                    cells.append(f"{statistics.mean(values):.1f}{spread}")
            cost = folder.values.get(("cost", start))
            if cost is None:
                cells += ["–"] * 3
            else:
                minutes = [sum(2 * 32 / s for s in c["speed"]) / 60 for c in cost]
                cells.append(f"{np.mean([np.median(c['speed']) for c in cost]):.0f}")
                cells.append(f"{max(max(c['memory']) for c in cost):.0f}")
                cells.append(f"{np.mean(minutes):.1f}")
            rows.append(cells)
    return rows


def cells(page, number=0):
    """Rows of the page's so-manyth table as text."""
    table = re.findall(r"<table>(.*?)</table>", page, re.DOTALL)[number]
    rows = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [
        [html.unescape(re.sub("<.*?>", "", c)) for c in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row)]
        for row in rows
    ]


def test_table_of_page_and_markdown(folder):
    page, markdown = (open(path, encoding="utf-8").read() for path in folder.paths[:2])
    header, *rows = cells(page)
    assert header[:6] == ["start", "labels", "n", "lr", "box AP", "box AP50"]
    assert header[-3:] == ["img/s", "peak MiB", "min"]
    assert rows == expected(folder)
    for row in rows:
        assert f"| {' | '.join(row)} |" in markdown
    header, first, *_ = cells(page, 1)
    assert header == ["start", "labels", "lr 0.05", "lr 0.1"]
    assert first == ["random weights", "100 %", "3.2", "4.6 (chosen)"]
    assert "Every pre-training sees 320 images" in page
    # 2 fractions x (box, mask), and the losses of two methods
    assert page.count("data:image/png;base64,") == 2 * 2 + 2
    assert not re.search(r'(src|href)="https?:', page)


def test_csv_has_all_digits(folder):
    with open(folder.paths[2], encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [(r["init"], float(r["label_fraction"])) for r in rows] == [
        (start, fraction) for fraction in (1.0, 0.1) for start in LABELS
    ]
    values = [f["segm"]["AP75"] for f in folder.values["soco", 0.1]]
    (row,) = (r for r in rows if (r["init"], r["label_fraction"]) == ("soco", "0.1"))
    assert float(row["segm/AP75 mean"]) == pytest.approx(np.mean(values), rel=1e-12)
    assert float(row["segm/AP75 std"]) == pytest.approx(np.std(values, ddof=1), rel=1e-12)
    assert (row["seeds"], row["wanted"], row["rate"]) == ("2", "2", "0.1")


def test_failure_and_runs(folder):
    page = open(folder.paths[0], encoding="utf-8").read()
    assert "det_mcl_0.1_1 failed" in page
    assert "iter 1/2\nRuntimeError: the disk &lt;melted&gt;</pre>" in page  # not submitit's own
    assert "Failed: det_mcl_0.1_1." in open(folder.paths[1], encoding="utf-8").read()
    header, *rows = cells(page, 2)
    assert header == ["run", "state", "iteration", "attempts", "min", "log"]
    states = {row[0]: row[1] for row in rows}
    assert states.pop("det_mcl_0.1_1") == "failed" and set(states.values()) == {"finished"}
    for href in re.findall(r'href="(.*?)"', page):
        assert (folder.root / href).exists()
    assert 'href="jobs/12_0_log.out"' in page


def test_means_of_curves_and_minutes_of_steps():
    points, values = mean_curve([{5: 1.0, 10: 4.0}, {5: 3.0, 10: 8.0, 15: 1.0}])
    assert (points, values) == ([5, 10], [2.0, 6.0])
    assert mean_curve([]) == ([], [])
    rows = [
        {"iteration": 9, "time": 6.0},
        {"iteration": 14, "bbox/AP": 1.0},
        {"iteration": 19, "time": 3.0},
    ]
    assert step_minutes(rows) == (10 * 6 + 10 * 3) / 60


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
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
            [*command, f"file://{folder.paths[0]}"], capture_output=True, text=True, timeout=120
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
    # The report is made as soon as the last product is there; its process then notes its end.
    plan, sweep = Plan(), tmp_path / "sweep"
    for name, started, ended in (("early", 1000.0, 1060.0), ("late", 1060.0, 1180.0)):
        run = Run(name, PRETRAIN, name, "t.py", ((),), str(sweep / name), str(sweep / name / "x"))
        plan.runs[name] = run
        plan.entries.append({"kind": PRETRAIN, "init": name, "seed": 0, "run": name})
        (sweep / name).mkdir(parents=True)
        (sweep / name / "x").touch()
        os.utime(sweep / name / "x", (ended, ended))
        attempt = {"job": "1", "restart": 0, "host": "h", "started": started, "start": ""}
        if name == "early":
            attempt |= {"ended": ended, "stop": "", "outcome": "finished"}
        (sweep / name / "attempts.json").write_text(json.dumps([attempt]))
    (sweep / "jobs").mkdir()
    labels = {"early": "Early", "late": "Late"}
    cluster = Cluster(kind="local")
    state.write_sweep(
        str(sweep), state.SweepFile("s", "S", "c", cluster, "/", "/", labels, None, plan)
    )
    page, markdown, _ = (Path(path).read_text() for path in write_sweep_report(str(sweep)))
    for text in (page, markdown):
        assert "2 finished. 3.0 minutes from the first start to the last end." in text
    cells = re.findall(r"<tr><td>(?:<a[^>]*>)?(early|late)\b.*?</tr>", page)
    rows = {c: re.search(rf">{c}(?:</a>)?</td>.*?</tr>", page, re.S)[0] for c in cells}
    minutes = {c: re.findall(r"<td[^>]*>([\d.]+)</td>", row)[-1] for c, row in rows.items()}
    assert {c: float(m) for c, m in minutes.items()} == {"early": 1.0, "late": 2.0}
