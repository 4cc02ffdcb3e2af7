"""Fine-tunings that were started one by one: their table, and what should be equal in them."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from forked import run_tool
from scipy.stats import ttest_rel

from region_pretrain.config import load_config, to_yaml
from region_pretrain.errors import UserError
from region_pretrain.sweeps.single_runs import compare_runs

ROOT = Path(__file__).parents[2]
DETECTOR = str(ROOT / "configs/detection/faster_rcnn_r18_fpn_shapes.py")
EQUAL = "Apart from weights, learning rate and seed, all settings are those of random weights."


@pytest.fixture
def finetuned(tmp_path, monkeypatch):
    """Writes the folder of a finished fine-tuning in the current one; returns its name."""
    monkeypatch.chdir(tmp_path)

    def write(name, ap, *overrides, results="results.json", machine="AMD EPYC"):
        folder = tmp_path / name
        folder.mkdir()
        cfg = load_config(DETECTOR, [f"train.output_dir={folder}", *overrides])
        (folder / "config.yaml").write_text(to_yaml(cfg))
        found = {"bbox": {"AP": ap, "AP50": ap + 20, "AP75": ap - 5}}
        (folder / results).write_text(json.dumps(found))
        facts = {"device": "cpu", "cpu": machine, "torch": "2.15.0+cpu"}
        (folder / "environment.json").write_text(json.dumps(facts))
        return name

    return write


def cells(text, caption):
    """The lines of the table below a caption, as label -> its other cells."""
    lines = text.partition(caption)[2].partition("---\n")[2].partition("\n\n")[0].splitlines()
    rows = [re.split(r"  +", line.strip()) for line in lines]
    return {name: values for name, *values in rows}


def test_tables_of_repetitions_and_paired_differences(finetuned):
    random, mine = [30.25, 33.5, 31.0], [36.5, 38.25, 35.5]
    runs = [finetuned(f"random{i}", ap, f"train.seed={i}") for i, ap in enumerate(random)]
    weights = "train.init_checkpoint=output/mine/model_final.pth"
    for i, ap in enumerate(mine):
        runs += [finetuned(f"mine{i}", ap, f"train.seed={i}", weights, "optimizer.lr=0.05")]
    text = compare_runs(runs)
    found = cells(text, "Box and mask AP")
    assert found["random weights"][:3] == [
        "3",
        "0.1",
        f"{np.mean(random):.1f} ± {np.std(random, ddof=1):.1f}",
    ]
    assert found["output/mine"][:3] == [
        "3",
        "0.05",
        f"{np.mean(mine):.1f} ± {np.std(mine, ddof=1):.1f}",
    ]
    low, high = ttest_rel(mine, random).confidence_interval()
    difference = np.subtract(mine, random)
    error = difference.std(ddof=1) / np.sqrt(3)
    expected = f"{difference.mean():+.1f} ± {error:.1f} [{low:+.1f}, {high:+.1f}]"
    assert cells(text, "Difference from random weights")["output/mine"][:2] == ["3", expected]
    assert text.endswith(EQUAL)
    # The spread of repetitions is not that between pre-trainings.
    assert "Each row is of one checkpoint: another pre-training may differ by more than" in text
    assert "Each row" not in compare_runs(runs[:4:3])  # one run each: no interval
    assert "box AP" in text and "mask AP  " not in text  # none of the detectors has masks


def test_the_first_run_is_the_reference(finetuned):
    a, b = finetuned("a", 30.0, "train.init_checkpoint=R-50.pkl"), finetuned("b", 34.0)
    assert cells(compare_runs([a, b]), "Difference from R-50.pkl")["random weights"][1] == "+4.0"
    assert (
        cells(compare_runs([f"{b}/", f"{a}/results.json"]), "Difference from random")["R-50.pkl"][1]
        == "-4.0"
    )


def test_settings_that_should_be_equal_are_listed(finetuned):
    runs = [
        finetuned("random", 30.0),
        finetuned("short", 31.0, "train.init_checkpoint=w.pth", "train.max_iter=100"),
        # nothing of this changes what is computed
        finetuned(
            "same",
            32.0,
            "train.init_checkpoint=v.pth",
            "train.log_period=1",
            "dataloader.train.num_workers=3",
        ),
    ]
    text = compare_runs(runs)
    differing = text.partition("Not comparable")[2].splitlines()
    assert differing[1] == "  short: train.max_iter: 300 -> 100" and len(differing) == 2
    assert EQUAL in compare_runs([runs[0], runs[2]])


def test_runs_that_differ_otherwise_are_no_repetitions(finetuned):
    runs = [
        finetuned("a", 30.0),
        finetuned("b", 40.0, "train.seed=1", "model.roi_heads.box_head.fc_dims=[64]"),
    ]
    found = cells(compare_runs(runs), "Box and mask AP")
    assert {name: values[0] for name, values in found.items()} == {
        "random weights": "1",
        "random weights (b)": "1",
    }


def test_seeds_without_a_partner_and_other_machines_are_named(finetuned):
    weights = "train.init_checkpoint=w.pth"
    a = finetuned("a", 30.0)
    text = compare_runs([a, finetuned("b", 31.0, "train.seed=1", weights)])
    assert (
        "No run has the train.seed of one of random weights, so there is no difference: w.pth"
        in text
    )
    assert "Difference from" not in text
    text = compare_runs([a, finetuned("c", 31.0, weights, machine="NVIDIA H200")])
    assert "pairs of two machines: 1 of w.pth" in " ".join(text.split())


def test_a_results_file_of_the_current_folder(finetuned, monkeypatch):
    monkeypatch.chdir(finetuned("a", 30.0))
    assert cells(compare_runs(["results.json"]), "Box and mask AP")["random weights"][2] == "30.0"


def test_evaluations_are_compared(finetuned):
    runs = [
        finetuned(n, ap, f"train.init_checkpoint={n}.pth", results="results_eval.json")
        for n, ap in (("a", 30.0), ("b", 28.5))
    ]
    assert cells(compare_runs(runs), "Difference from a.pth")["b.pth"][1] == "-1.5"


def test_what_cannot_be_compared_is_reported(finetuned, tmp_path):
    run = finetuned("run", 30.0)
    again = finetuned("again", 31.0)
    with pytest.raises(UserError, match="run and again have equal settings and the seed 0"):
        compare_runs([run, again])
    with pytest.raises(UserError, match="there is no folder none"):
        compare_runs([run, "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty has no config.yaml"):
        compare_runs(["empty"])
    (tmp_path / "again/results.json").unlink()
    with pytest.raises(
        UserError, match="again has no results.json: it is a pre-training, or a fine"
    ):
        compare_runs([again])
    (tmp_path / "again/results.json").write_text('{"sem_seg": {"mIoU": 3.0}}')
    with pytest.raises(UserError, match="neither box nor mask AP, only sem_seg"):
        compare_runs([again])
    (tmp_path / "again/sweep.json").write_text("{}")
    with pytest.raises(UserError, match="again is a sweep: region-pretrain sweep report again"):
        compare_runs([again])


def test_command_line(finetuned):
    done = run_tool(
        "compare.py", finetuned("a", 30.0), finetuned("b", 33.0, "train.init_checkpoint=w.pth")
    )
    assert done.returncode == 0, done.stderr
    assert cells(done.stdout, "Difference from random weights")["w.pth"][1] == "+3.0"
    done = run_tool("compare.py", "none")
    assert done.returncode == 2 and "error: there is no folder none" in done.stderr
