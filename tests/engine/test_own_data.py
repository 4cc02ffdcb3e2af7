"""Fine-tuning on the user's own labels: by path and registered in code, in every process."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import get_detection_dataset_dicts as get_dicts
from forked import LONG
from tiny_run import make_detection_config

from region_pretrain.config import load_config
from region_pretrain.engine.finetune import do_evaluate, do_train
from region_pretrain.errors import UserError

ROOT = Path(__file__).parents[2]
SHAPES = str(ROOT / "configs/detection/mask_rcnn_r18_fpn_shapes.py")
SHORT = [
    "dataloader.train.total_batch_size=2",
    "dataloader.train.num_workers=0",
    "train.max_iter=2",
    "train.device=cpu",
    "train.eval_period=0",
]

REGISTER = """
from detectron2.data.datasets import register_coco_instances

register_coco_instances("own_train", {{}}, "{0}/ann.json", "{0}/images")
register_coco_instances("own_val", {{}}, "{0}/ann.json", "{0}/images")
"""


def run(*args, cwd):
    command = [sys.executable, str(ROOT / "tools/train_net.py"), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LONG, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_mask_rcnn_is_trained_saved_and_evaluated_by_path(
    coco_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(coco_folder)
    name = "coco://ann.json?images=images"
    names = [f"dataloader.{split}.dataset.names={name}" for split in ("train", "test")]
    cfg = load_config(SHAPES, [*SHORT, *names, f"train.output_dir={tmp_path}/run"])
    trained = do_train(cfg)["bbox"]
    log = (tmp_path / "run/log.txt").read_text()
    assert "model.roi_heads.num_classes=3 follows from the data; 3 classes: dog, ant, cat" in log

    saved = load_config(str(tmp_path / "run/config.yaml"))
    assert saved.model.roi_heads.num_classes == 3
    path = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
    assert saved.dataloader.train.dataset.names == saved.dataloader.evaluator.dataset_name == path

    final = str(tmp_path / "run/model_final.pth")
    assert torch.load(final, weights_only=True)["thing_classes"] == ["dog", "ant", "cat"]
    detector = instantiate(saved.model)
    extra = DetectionCheckpointer(detector, save_to_disk=False).load(final)
    assert extra["thing_classes"] == ["dog", "ant", "cat"]
    weights = torch.load(final, weights_only=True)["model"]
    assert all(torch.equal(value, weights[key]) for key, value in detector.state_dict().items())

    monkeypatch.chdir(tmp_path)
    overrides = [f"train.init_checkpoint={final}", "train.output_dir=eval"]
    cfg = load_config("run/config.yaml", overrides)
    np.testing.assert_equal(do_evaluate(cfg)["bbox"], trained)  # NaN: no large boxes
    assert f"results: {tmp_path}/eval/results_eval.json\n" in capsys.readouterr().out
    resumed = do_train(load_config("run/config.yaml"), resume=True)  # the config is equal
    np.testing.assert_equal(resumed["bbox"], trained)

    data = json.loads((coco_folder / "ann.json").read_text())
    data["categories"][0]["name"] = "dog2"
    (coco_folder / "other.json").write_text(json.dumps(data))
    other = f"dataloader.test.dataset.names=coco://{coco_folder}/other.json?images=x"
    other = other.replace("=x", f"={coco_folder}/images")
    with pytest.raises(UserError, match="class 2 is 'cat' and 'dog2'"):
        do_evaluate(load_config("run/config.yaml", [*overrides, other]))


def write_tiny(path, text, names, folder):
    cfg = make_detection_config(folder, max_iter=2, eval_period=0, precise_bn={"enabled": False})
    for split, name in zip(("train", "test"), names, strict=True):
        cfg.dataloader[split].dataset = L(get_dicts)(names=name)
    saved = str(path.with_suffix(".yaml"))
    LazyConfig.save(cfg, saved)
    code = "from detectron2.config import LazyConfig\nlocals().update(LazyConfig.load({!r}))\n"
    path.write_text(text + code.format(saved))


def test_two_processes_and_a_saved_config_know_data_registered_in_a_config(coco_folder, tmp_path):
    config = tmp_path / "mine.py"
    write_tiny(config, REGISTER.format(coco_folder), ("own_train", "own_val"), tmp_path / "run")
    run("--config-file", "mine.py", "--num-gpus", 2, cwd=tmp_path)
    saved = LazyConfig.load(str(tmp_path / "run/config.yaml"))
    assert list(saved.train.register) == [str(config)]
    results = json.loads((tmp_path / "run/results.json").read_text())
    final = f"train.init_checkpoint={tmp_path}/run/model_final.pth"
    again = ["--config-file", tmp_path / "run/config.yaml", "--eval-only", "--num-gpus", 2]
    run(*again, final, "train.output_dir=eval", cwd=coco_folder)
    evaluated = json.loads((coco_folder / "eval/results_eval.json").read_text())
    assert evaluated["bbox"]["AP"] == pytest.approx(results["bbox"]["AP"], rel=1e-5)
    state = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert state["thing_classes"] == ["dog", "ant", "cat"]


def test_two_processes_know_data_by_relative_path(coco_folder, tmp_path):
    config = tmp_path / "mine.py"
    name = "coco://ann.json?images=images"
    write_tiny(config, "", (name, name), tmp_path / "run")
    options = ["--num-gpus", 2, "train.device=cpu"]
    run("--config-file", os.path.relpath(config, coco_folder), *options, cwd=coco_folder)
    saved = LazyConfig.load(str(tmp_path / "run/config.yaml"))
    path = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
    assert saved.dataloader.train.dataset.names == saved.dataloader.test.dataset.names == path
    state = torch.load(tmp_path / "run/model_final.pth", weights_only=True)
    assert state["thing_classes"] == ["dog", "ant", "cat"]
    assert (tmp_path / "run/results.json").exists()
