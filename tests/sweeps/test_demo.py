"""The demo at a tiny size, end to end, as a newcomer types it; and a stop, and a failure."""

import base64
import html
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.env import seed_all_rng

from region_pretrain.config import load_config
from region_pretrain.errors import UserError
from region_pretrain.reporting.boxes import draw_detections
from region_pretrain.reporting.pictures import first_views, sheet, view_pictures
from region_pretrain.sweeps import state, submission
from region_pretrain.sweeps.definition import load_sweep
from region_pretrain.sweeps.graph import FINETUNE, PRETRAIN
from region_pretrain.sweeps.plan import make_plan
from region_pretrain.sweeps.report import results_text
from region_pretrain.sweeps.rows import read_csv

ROOT = Path(__file__).parents[2]
COUNT = 2  # images in pictures
PRETRAIN_SIZE = [
    "train.device=cpu",
    "dataloader.train.dataset.names.size=24",
    "dataloader.train.total_batch_size=8",
    "dataloader.train.num_workers=0",
    "train.max_iter=4",
    "train.log_period=1",
    "train.hooks.0.train_names.size=16",
    "train.hooks.0.val_names.size=8",
]
FINETUNE_SIZE = [
    "train.device=cpu",
    "dataloader.train.dataset.names.size=16",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.num_workers=0",
    "dataloader.test.dataset.names.size=8",
    "train.max_iter=4",
    "train.eval_period=2",
    "train.log_period=1",
    "model.roi_heads.box_predictor.test_score_thresh=0.0",
]


def tool(folder, *words):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "tools/sweep.py", *words]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run(folder, *words, pretrain=(), output="demo"):
    return tool(
        folder,
        *("--config", "configs/sweeps/demo.py", "--jobs", "1", *words),
        f"sweep.pictures={COUNT}",
        f"sweep.output_dir={folder / output}",
        f"sweep.pretrain_overrides={json.dumps([*PRETRAIN_SIZE, *pretrain])}",
        f"sweep.finetune_overrides={json.dumps(FINETUNE_SIZE)}",
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run(folder, "--wait")
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def runs(demo):
    """Kind or initialisation -> run."""
    plan = state.read_sweep(str(demo[0] / "demo")).plan
    names = {PRETRAIN: lambda e: PRETRAIN, FINETUNE: lambda e: e["init"]}
    return {names[e["kind"]](e): plan.runs[e["run"]] for e in plan.entries if e["kind"] in names}


@pytest.fixture
def datasets(demo, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(demo[0] / "datasets"))


def metrics(run):
    lines = (Path(run.folder) / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


def config(run):
    return load_config(str(Path(run.folder) / "config.yaml"))


def tables(folder):
    """Header -> rows of each table of the Markdown report."""
    blocks = (folder / "demo/report.md").read_text().split("\n\n")
    found = [[line[2:-2].split(" | ") for line in b.splitlines()] for b in blocks if b[0] == "|"]
    return [(header, rows) for header, _, *rows in found]


def test_what_to_expect_stands_beside_the_results(demo):
    """And is what docs/results/demo.csv contains, as docs/shapes.md does."""
    notes = load_sweep("configs/sweeps/demo.py").notes
    assert notes in (demo[0] / "demo/report.md").read_text()
    assert notes in " ".join(demo[1].split())
    rows = {row.init: row for row in read_csv("docs/results/demo.csv")}
    page = (ROOT / "docs/shapes.md").read_text()
    for name, key in (("box", "bbox/AP"), ("mask", "segm/AP")):
        ours, theirs = ([*rows[init].values(key).values()] for init in ("soco", "random"))
        assert len(ours) == len(theirs) == 5
        gains = [a - b for a, b in zip(ours, theirs, strict=True)]
        for label, values, sign in (
            (f"{name} AP, random weights", theirs, ""),
            (f"{name} AP, SoCo", ours, ""),
            ("difference", gains, "+"),
        ):
            row = " | ".join(f"{value:{sign}.1f}" for value in values)
            spread = f" ± {np.std(values, ddof=1):.1f} |" if not sign else " ["
            assert f"| {label} | {row} | {np.mean(values):{sign}.1f}{spread}" in page
        if name == "box":
            expected = [min(theirs), max(theirs), min(gains), max(gains), np.mean(gains)]
            found = re.findall(r"\d+\.\d", notes)
            assert found == [f"{value:.1f}" for value in expected]


@pytest.mark.parametrize(("init", "place"), [("random", 0), ("soco", 1)])
def test_numbers_are_those_of_the_runs(demo, runs, init, place):
    mine = json.loads(Path(runs[init].product).read_text())
    last = metrics(runs[init])[-1]
    header, rows = tables(demo[0])[0]
    row = dict(zip(header, rows[place], strict=True))
    label = {"random": "random weights", "soco": "SoCo"}[init]
    assert [row[k] for k in ("initialisation", "n", "learning rate")] == [label, "1", "0.1"]
    for task, name in (("bbox", "box"), ("segm", "mask")):
        for metric in ("AP", "AP50"):
            ap = mine.get(task, {}).get(metric)
            if ap is None:  # after four steps a detector may find nothing at all
                assert math.isnan(last.get(f"{task}/{metric}", math.nan))
                assert row[f"{name} {metric}"] == "–"
            else:
                assert last[f"{task}/{metric}"] == pytest.approx(ap)
                assert row[f"{name} {metric}"] == f"{ap:.1f}"


def test_difference_is_that_of_the_runs(demo, runs):
    header, (row,) = tables(demo[0])[1]
    random, soco = (json.loads(Path(runs[i].product).read_text()) for i in ("random", "soco"))
    assert row[:2] == ["SoCo", "1"]
    difference = soco["bbox"]["AP50"] - random["bbox"]["AP50"]
    assert row[header.index("box AP50")] == f"{difference:+.1f}"


def test_initialisations_differ_in_nothing_but_weights_and_folder(runs):
    scratch, pretrained = (set(runs[init].tasks[0]) for init in ("random", "soco"))
    names = {a.split("=")[0] for a in scratch ^ pretrained}
    assert names == {"train.init_checkpoint", "train.output_dir"}
    assert f"train.init_checkpoint={runs[PRETRAIN].product}" in pretrained
    for init in ("random", "soco"):
        cfg = config(runs[init])
        assert cfg.optimizer.lr == 0.1 and cfg.train.clip_grad.enabled
    log = (Path(runs["soco"].folder) / "log.txt").read_text()
    loaded = re.search(r"backbone\.bottom_up +(\d+)/(\d+) .* loaded", log)
    assert loaded and loaded[1] == loaded[2]
    assert "weights from" not in (Path(runs["random"].folder) / "log.txt").read_text()


def test_probe_of_the_random_and_of_the_pretrained_network(demo, runs, datasets):
    rows = [row for row in metrics(runs[PRETRAIN]) if "probe/knn_fpn" in row]
    assert [row["iteration"] for row in rows] == [0, 3]
    # Modules are initialised in the order of the config's keys, which config.yaml sorts.
    cfg = load_config(runs[PRETRAIN].tasks[0][1], runs[PRETRAIN].tasks[0][2:])
    seed_all_rng(0)
    (probe,) = instantiate(cfg.train.hooks)
    model = instantiate(cfg.model)
    for row, weights in ((rows[0], None), (rows[1], runs[PRETRAIN].product)):
        if weights:
            saved = torch.load(weights, weights_only=True)
            model.load_state_dict({**saved["model"], **saved["pretraining"]})
        probe.trainer = type("Run", (), {"start_iter": 1})  # it reads its data and logs nothing
        probe.before_train()
        expected = probe.probe(model)
        assert expected.keys() == {"probe/knn_trunk", "probe/knn_fpn", "probe/knn_head"}
        assert {key: row[key] for key in expected} == pytest.approx(expected)
    header, (row,) = tables(demo[0])[2]
    assert header == ["pre-training", "kNN, trunk", "kNN, FPN", "kNN, box head"]
    first, last = (f"{100 * row['probe/knn_fpn']:.1f}" for row in rows)
    assert row[0] == "SoCo" and row[2] == f"{first} → {last}"


def pictures(page):
    """Caption -> (H, W, 3) RGB of each picture on the page."""
    pattern = r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"'
    found = {}
    for caption, data in re.findall(pattern, page):
        png = np.frombuffer(base64.b64decode(data, validate=True), np.uint8)
        found[html.unescape(caption)] = cv2.imdecode(png, cv2.IMREAD_COLOR)[..., ::-1]
    return found


@pytest.fixture(scope="module")
def page(demo):
    return (demo[0] / "demo/report.html").read_text()


def test_report_has_tables_and_pictures(demo, page):
    bare = re.sub(r' (class="number"|tabindex="0"|data-number="[^"]*")', "", page)
    for header, rows in tables(demo[0]):
        assert "".join(f"<th>{cell}</th>" for cell in header) in bare
        for row in rows:
            assert "".join(f"<td>{cell}</td>" for cell in row) in bare
    found = pictures(page)
    assert list(found) == [
        "box AP, 100 % of the labels, mean over the seeds",
        "mask AP, 100 % of the labels, mean over the seeds",
        "ground truth",
        "random weights",
        "SoCo",
        "Pre-training loss of SoCo",
        "Views of SoCo",
    ]
    assert all(picture.std() > 5 for picture in found.values())
    assert "No picture" not in page
    titles = re.findall("<h2>(.*)</h2>", page)
    assert titles == [
        "Results",
        "AP during fine-tuning",
        "Detections",
        "Pre-training losses",
        "What pre-training sees",
        "Runs",
    ]


def test_views_are_those_of_the_first_batch(runs, page, datasets):
    cfg = config(runs[PRETRAIN])
    loader = cfg.dataloader.train.copy()
    loader.seed, loader.num_workers = 0, 0
    batch = next(iter(instantiate(loader).iterate(0, 4)))
    views = first_views(cfg, COUNT)
    assert views.indices.tolist() == batch.indices[:COUNT].tolist()
    found = pictures(page)["Views of SoCo"]
    assert (found == sheet(view_pictures(views), 288)).all()


def test_detections_are_those_of_the_final_checkpoints(runs, page, datasets):
    cfg = LazyConfig.load(str(Path(runs["soco"].folder) / "config.yaml"))
    name = instantiate(cfg.dataloader.test.dataset.names)
    records, classes = DatasetCatalog.get(name)[:COUNT], MetadataCatalog.get(name).thing_classes
    images = [cv2.imread(record["file_name"])[..., ::-1] for record in records]
    truth = []
    for image, record in zip(images, records, strict=True):
        boxes = [a["bbox"] for a in record["annotations"]]
        assert len(boxes) > 0 and {a["bbox_mode"] for a in record["annotations"]} <= {0, 1}
        corners = [
            [x, y, x + w, y + h] if a["bbox_mode"] == 1 else [x, y, w, h]
            for a, (x, y, w, h) in zip(record["annotations"], boxes, strict=True)
        ]
        labels = [a["category_id"] for a in record["annotations"]]
        truth.append([draw_detections(image, np.array(corners), labels, classes)])
    found = pictures(page)
    assert (found["ground truth"] == sheet(truth, 288)).all()
    for init, label in (("random", "random weights"), ("soco", "SoCo")):
        detector = instantiate(cfg.model).eval()
        DetectionCheckpointer(detector).load(str(Path(runs[init].folder) / "model_final.pth"))
        drawn = []
        for image in images:
            pixels = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
            size = {"height": image.shape[0], "width": image.shape[1]}
            with torch.no_grad():
                instances = detector([{"image": pixels, **size}])[0]["instances"]
            fields = instances.pred_boxes.tensor.numpy(), instances.pred_classes.tolist()
            drawn.append([draw_detections(image, *fields, classes, instances.scores.tolist())])
        assert (found[label] == sheet(drawn, 288)).all()


def test_text_for_the_terminal(demo, runs):
    text = results_text(str(demo[0] / "demo"))
    ap = json.loads(Path(runs["soco"].product).read_text())["bbox"]["AP"]
    assert re.search(rf"^SoCo +1 +0\.1 +{ap:.1f} ", text, re.M)
    assert "kNN, box head" in text and max(map(len, text.splitlines())) < 110


def test_the_second_time_nothing_runs_again(demo):
    folder, _ = demo
    before = {p: p.stat().st_mtime_ns for p in (folder / "demo").rglob("*.p[tn][hg]")}
    assert len([p for p in before if p.suffix == ".pth"]) >= 3
    pictures = {p.name: p.stat().st_size for p in before if p.suffix == ".png"}
    assert len(pictures) == 5  # they are kept, and that SoCo draws none of its own
    assert [n for n, size in pictures.items() if not size] == [n for n in pictures if "method" in n]
    table = (folder / "demo/results.csv").read_text()
    done = run(folder, "--wait")
    assert done.returncode == 0, done.stderr
    assert "4 runs: 4 finished" in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (folder / "demo").rglob("*.p[tn][hg]")} == before
    assert (folder / "demo/results.csv").read_text() == table


def test_a_deleted_checkpoint_costs_one_picture(demo, runs):
    folder = demo[0] / "demo"
    checkpoint = Path(runs["random"].folder) / "model_final.pth"
    (picture,) = (folder / "pictures").glob("random_*-detections*.png")
    data, moved = picture.read_bytes(), checkpoint.rename(checkpoint.with_suffix(".away"))
    picture.unlink()
    try:
        done = tool(demo[0], "report", str(folder))
    finally:
        moved.rename(checkpoint)
    assert done.returncode == 0, done.stderr
    page = (folder / "report.html").read_text()
    (line,) = re.findall(r"<p>(No picture for .*)</p>", page)
    assert line.startswith("No picture for “random weights” (random_seed0_det): ")
    assert str(checkpoint) in line
    assert "random weights" not in pictures(page) and "SoCo" in pictures(page)
    assert tool(demo[0], "report", str(folder)).returncode == 0
    assert picture.read_bytes() == data and "No picture" not in (folder / "report.html").read_text()


def test_a_stopped_sweep_resumes_and_its_minutes_add_up(demo):
    folder, out = demo[0], demo[0] / "stopped"
    only = ["sweep.finetune.detector=null"]
    long = ["train.max_iter=40", "train.checkpointer.period=1"]
    shutil.copytree(folder / "demo/runs", out / "runs")  # the regions need not run again
    assert run(folder, *only, pretrain=long, output="stopped").returncode == 0
    (mine,) = (r for r in state.read_sweep(str(out)).plan.runs.values() if r.kind == PRETRAIN)
    end = time.monotonic() + 120
    while not (Path(mine.folder) / "last_checkpoint").exists():
        assert time.monotonic() < end and not state.is_finished(mine)
        time.sleep(0.05)
    assert submission.cancel(str(out)) == ["soco_seed0"]  # at once, in this process
    assert not state.is_finished(mine)
    done = run(folder, "--wait", *only, pretrain=long, output="stopped")
    assert done.returncode == 0, done.stdout + done.stderr
    attempts = state.attempts(mine)  # the last one may not have recorded its end yet
    assert len(attempts) == 2 and attempts[0]["outcome"] != "finished"
    assert attempts[1]["start"] == attempts[0]["stop"] != ""
    rows = metrics(mine)
    assert [row["iteration"] for row in rows] == list(range(40))
    assert [r["iteration"] for r in rows if "probe/knn_fpn" in r] == [0, 39]
    minutes = sum((a["ended"] or a["started"]) - a["started"] for a in attempts) / 60
    (row,) = re.findall(
        r"<tr>\s*<td><a [^>]*>soco_seed0</a></td>.*", (out / "report.html").read_text()
    )
    numbers = re.findall(r"<td[^>]*>([^<]*)</td>", row)
    assert numbers[-2] == "2"
    # Until the attempt has recorded its end, the report counts it up to its last file.
    assert float(numbers[-1]) == pytest.approx(minutes, abs=0.15)


def test_a_failure_is_reported_with_the_tail_of_its_log(demo):
    folder, out = demo[0], demo[0] / "failed"
    absent = ["train.init_checkpoint=absent.pth"]
    shutil.copytree(folder / "demo/runs", out / "runs")  # only the pre-training runs
    done = run(folder, "--wait", pretrain=absent, output="failed")
    assert done.returncode == 1
    error = "error: train.init_checkpoint: there is no absent.pth"
    assert error in done.stdout and "soco_seed0" in done.stdout
    page = (out / "report.html").read_text()
    assert "soco_seed0 failed. These runs depend on it: soco_seed0_det." in page
    assert error in re.search("<pre[^>]*>(.*?)</pre>", page, re.S)[1]
    (log,) = re.findall(r">soco_seed0</a></td>.*?<a href=\"([^\"]*)\">log</a>", page)
    assert error in (out / log).read_text()
    states = dict(re.findall(r"<td>(?:<a [^>]*>)?(\w+)(?:</a>)?</td>\s*<td>(\w+)</td>", page))
    assert states["random_seed0_det"] == "finished" and states["soco_seed0_det"] == "blocked"


def test_overrides_of_an_initialisation_win_and_pictures_are_checked(tmp_path):
    path = str(ROOT / "configs/sweeps/demo.py")
    changes = [
        f"sweep.output_dir={tmp_path}",
        "sweep.finetune.detector.learning_rates=[]",
        "sweep.finetune_overrides=['optimizer.lr=7']",
        "sweep.pretrain.soco.finetune_overrides=['optimizer.lr=0.05']",
    ]
    plan = make_plan(load_sweep(path, changes))
    tuned = {e["init"]: plan.runs[e["run"]] for e in plan.entries if e["kind"] == FINETUNE}
    rates = {
        i: load_config(run.tasks[0][1], run.tasks[0][2:]).optimizer.lr for i, run in tuned.items()
    }
    assert rates == {"random": 7, "soco": 0.05}
    with pytest.raises(UserError, match="sweep.pictures=-1"):
        load_sweep(path, ["sweep.pictures=-1"])
