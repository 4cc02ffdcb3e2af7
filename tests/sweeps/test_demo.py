"""The demo from end to end at its quick size, as a newcomer would type it."""

import base64
import io
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.sweeps.demo import run_demo, summarise
from region_pretrain.sweeps.demo_tables import shown, tables

ROOT = Path(__file__).parents[2]


def run(folder, *args):
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(folder / "datasets"),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "tools/demo.py", "--quick", "--output-dir", str(folder / "demo")]
    return subprocess.run(
        [*command, *args], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    done = run(folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


@pytest.fixture(scope="module")
def results(demo):
    return json.loads((demo[0] / "demo/results.json").read_text())


def metrics(folder):
    lines = (folder / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("start", ["scratch", "pretrained"])
def test_numbers_are_those_of_the_runs(demo, results, start):
    run_folder = demo[0] / "demo/seed0" / start
    mine = results["by_seed"]["0"]["finetuning"][start]
    assert mine == json.loads((run_folder / "results.json").read_text())
    last = metrics(run_folder)[-1]
    for task in ("bbox", "segm"):
        for metric in ("AP", "AP50"):
            value = results["summary"][f"{task}/{metric}"][start]
            ap = mine.get(task, {}).get(metric)
            if ap is None:  # after four steps a detector may find nothing at all
                assert math.isnan(last.get(f"{task}/{metric}", math.nan))
                assert value == {"mean": None, "std": None}
            else:
                assert last[f"{task}/{metric}"] == pytest.approx(ap)
                assert value == {"mean": pytest.approx(ap), "std": None}


def test_both_starts_differ_in_nothing_but_weights_rate_and_folder(demo, results):
    scratch, pretrained = (
        set(results["commands"][f"{start} seed0"].split()) for start in ("scratch", "pretrained")
    )
    names = {a.split("=")[0] for a in scratch ^ pretrained}
    assert names <= {"train.init_checkpoint", "train.output_dir", "optimizer.lr"}
    assert names >= {"train.init_checkpoint", "train.output_dir"}
    log = (demo[0] / "demo/logs/pretrained_seed0.txt").read_text()
    loaded = re.search(r"backbone\.bottom_up +(\d+)/(\d+) .* loaded", log)
    assert loaded and loaded[1] == loaded[2]
    assert "weights from" not in (demo[0] / "demo/logs/scratch_seed0.txt").read_text()


def test_probe_of_random_and_of_learnt_features(results):
    knn = results["by_seed"]["0"]["knn"]
    assert knn.keys() == {"random", "pretrained"}
    for values in knn.values():
        assert values.keys() == {"trunk", "fpn", "head"}
        assert all(0 <= value <= 100 for value in values.values())
    assert results["summary"]["knn/fpn"]["scratch"]["mean"] == knn["random"]["fpn"]


def test_table_is_printed_and_in_the_report_with_pictures(demo, results):
    folder, stdout = demo
    page = (folder / "demo/report.html").read_text()
    for _, header, rows in tables(results):
        for row in rows:
            cells = "".join(f"<td>{cell}</td>" for cell in row)
            assert cells in re.sub(r' class="number"', "", page)
            assert " ".join(filter(None, map(str, row))) in re.sub(r"[ \t]+", " ", stdout)
        assert all(name in page for name in header)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    # 4 images x 3 views, loss, box AP, mask AP, 4 images x (truth, scratch, pre-trained)
    assert len(pictures) == 12 + 3 + 12
    for picture in pictures:
        with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
            assert np.asarray(image.convert("RGB")).std() > 0


def test_versions_machine_and_minutes(results):
    assert results["versions"]["torch"] == torch.__version__
    assert results["machine"]["cores"] >= 1 and results["machine"]["cpu"]
    expected = ["regions", "pretrain seed0", "scratch seed0", "pretrained seed0"]
    assert list(results["minutes"]) == list(results["commands"]) == expected
    assert all(minutes > 0 for minutes in results["minutes"].values())
    assert results["quick"]


def test_second_time_runs_nothing_again(demo, results):
    folder, _ = demo
    before = {p: p.stat().st_mtime_ns for p in (folder / "demo/seed0").rglob("*.pth")}
    assert len(before) >= 3
    done = run(folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished before") == 4 and "$ python" not in done.stdout
    assert {p: p.stat().st_mtime_ns for p in (folder / "demo/seed0").rglob("*.pth")} == before
    again = json.loads((folder / "demo/results.json").read_text())
    assert again["by_seed"] == results["by_seed"]


def seed(scratch, pretrained, random=50.0, learnt=60.0):
    def task(values):
        return {"AP": values[0], "AP50": values[1]}

    return {
        "finetuning": {
            "scratch": {"bbox": task(scratch), "segm": task(scratch)},
            "pretrained": {"bbox": task(pretrained), "segm": task(pretrained)},
        },
        "knn": {"random": {"fpn": random}, "pretrained": {"fpn": learnt}},
    }


def test_mean_and_sample_deviation_of_paired_differences():
    summary = summarise(
        {
            "0": seed((10, 20), (14, 25)),
            "1": seed((12, 20), (15, 27)),
            "2": seed((11, 20), (16, 26)),
        }
    )
    box = summary["bbox/AP"]
    assert box["scratch"] == {"mean": pytest.approx(11), "std": pytest.approx(1)}
    assert box["pretrained"] == {"mean": pytest.approx(15), "std": pytest.approx(1)}
    # 4, 3, 5
    assert box["difference"] == {"mean": pytest.approx(4), "std": pytest.approx(1)}
    # 5, 7, 6 against a constant 20
    assert summary["segm/AP50"]["scratch"]["std"] == 0
    assert summary["segm/AP50"]["difference"] == {"mean": pytest.approx(6), "std": pytest.approx(1)}
    assert shown(box["difference"]) == "4.0 ± 1.0"


def test_an_undefined_ap_stays_undefined():
    summary = summarise({"0": seed((None, 20), (14, 25)), "1": seed((12, 20), (15, 27))})
    assert summary["bbox/AP"]["scratch"] == {"mean": None, "std": None}
    assert summary["bbox/AP"]["difference"]["mean"] is None
    assert shown(summary["bbox/AP"]["scratch"]) == "–"


def test_seeds_are_different_and_at_least_one(tmp_path):
    for seeds in ((), (1, 1)):
        with pytest.raises(UserError, match="--seeds"):
            run_demo("a.py", "b.py", str(tmp_path), seeds)
