"""Complete runs: loading into stock Detectron2, resuming, errors, pictures."""

import json
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from project_runs import six_steps, stopped_in_step

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.projects.ccop import Feedback
from region_pretrain.regions import RegionStore, write_store
from region_pretrain.reporting.boxes import _LABEL_WIDTH
from region_pretrain.reporting.pictures import first_views, model_pictures

ROOT = Path(__file__).parents[3]
RECIPE = ROOT / "projects/CCOP/configs/ccop_r18-fpn_b32_shapes.py"


@pytest.fixture
def config(region_folder, tmp_path):
    """``config(name, *overrides)``: the Shapes recipe on the folder's images, a few steps."""

    def make(name: str, *overrides: str):
        return six_steps(
            RECIPE,
            region_folder.images,
            tmp_path / name,
            f"dataloader.train.dataset.regions={region_folder.store}",
            "dataloader.train.dataset.recipe=null",
            "dataloader.train.dataset.views.size=32",
            "model.image_queue.length=32",
            "model.region_queue.length=64",
            "model.level_scales=[8,16,30,32]",
            "lr_multiplier.warmup_epochs=0",
            *overrides,
        )

    return make


def metrics(folder) -> dict[int, dict]:
    clock = ("time", "data_time", "img_per_sec", "eta_seconds", "peak_memory_mib")
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {x["iteration"]: {k: v for k, v in x.items() if k not in clock} for x in lines}


@pytest.mark.parametrize("closed_loop", [False, True])
def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, closed_loop):
    def start(name: str, resume: bool = False):
        cfg = config(name)
        if closed_loop:
            cfg.model.curriculum.feedback = L(Feedback)(set_point=0.2, gain=0.5, period=2)
        do_pretrain(cfg, resume=resume)
        return metrics(tmp_path / name)

    whole = start("whole")
    with stopped_in_step(5):
        start("parts")
    assert start("parts", resume=True) == whole and sorted(whole) == list(range(6))
    assert "Starting training from iteration 4" in (tmp_path / "parts/log.txt").read_text()
    levels = [whole[i]["curriculum/level"] for i in range(6)]
    if closed_loop:
        assert levels[:2] == [0, 0] and levels[2] == levels[3] > 0 and levels[4] != levels[3]
    else:
        assert levels == pytest.approx(np.arange(1, 7) / 6)
    for name in ("valid_fraction", "chosen_iou", "chosen_similarity", "center_range", "iou_floor"):
        assert all(f"curriculum/{name}" in line for line in whole.values())
    first, second = (
        torch.load(tmp_path / name / "model_final.pth", weights_only=True)["pretraining"]
        for name in ("whole", "parts")
    )
    assert {"curriculum._extra_state", "region_queue.keys", "region_queue.pointer"} <= set(first)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_stock_detectron2_fills_backbone_and_pyramid(config, tmp_path):
    """A process that cannot import this project loads the file into the detector."""
    do_pretrain(config("stock"))
    path = str(tmp_path / "stock/model_final.pth")
    code = f"""
        import sys
        sys.modules["region_pretrain"] = None  # importing it fails
        import torch
        from detectron2 import model_zoo
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import LazyCall as L, instantiate
        from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

        cfg = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model.backbone
        cfg.bottom_up.stem.update(out_channels=24, norm="BN")
        cfg.bottom_up.stages = [
            L(ResNet.make_stage)(
                block_class=BasicBlock, num_blocks=2, stride_per_block=[stride, 1],
                in_channels=inputs, out_channels=outputs, norm="BN",
            )
            for inputs, outputs, stride in ((24, 24, 1), (24, 48, 2), (48, 96, 2), (96, 192, 2))
        ]
        cfg.update(norm="BN", out_channels=48)
        detector = torch.nn.Module()
        detector.backbone = instantiate(cfg)
        detector.roi_heads = torch.nn.Linear(2, 3)  # stands for what the file does not contain
        checkpointer = DetectionCheckpointer(detector)
        incompatible = []
        checkpointer._log_incompatible_keys = incompatible.append
        checkpointer.load({path!r})
        saved = torch.load({path!r}, weights_only=True)["model"]
        state = detector.state_dict()
        assert set(saved) == {{n for n in state if n.startswith("backbone.")}}
        assert all(torch.equal(state[n], v) for n, v in saved.items())
        (keys,) = incompatible
        assert not keys.unexpected_keys and not keys.incorrect_shapes, keys
        print(sorted(keys.missing_keys))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['roi_heads.bias', 'roi_heads.weight']"

    detector = instantiate(
        LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py")).model
    )
    report = load_pretrained(detector, path)
    assert {n for n, c in report.modules.items() if c.loaded_tensors == c.tensors} == {
        "backbone.bottom_up",
        "backbone.fpn",
    }
    assert not report.unexpected
    assert {n.split(".")[0] for n in report.missing} == {"proposal_generator", "roi_heads"}


def test_annotated_boxes_must_be_allowed(config, region_folder, tmp_path, caplog):
    store = RegionStore.open(region_folder.store)
    path = str(tmp_path / "labels.arrow")
    rows = [(key, *store.size(key), boxes) for key, boxes in region_folder.boxes.items()]
    write_store(path, rows, {"recipe": "ground_truth-v1"})
    override = f"dataloader.train.dataset.regions={path}"
    with pytest.raises(UserError, match="labels.arrow.*allow_ground_truth=True"):
        instantiate(config("labels", override).dataloader.train)
    allowed = config("labels", override, "dataloader.train.dataset.allow_ground_truth=True")
    assert len(instantiate(allowed.dataloader.train).dataset) == 12
    assert "uses labels" in caplog.text


def test_the_picture_of_the_candidates(config, tmp_path):
    cfg = config("picture")
    batch = first_views(cfg, 3)
    rows = model_pictures(cfg, batch)
    assert len(rows) == 3 and all(len(row) == 3 for row in rows)
    scale = -(-_LABEL_WIDTH // 32)
    yellow = np.array((255, 215, 0))
    drawn = [i for i in range(3) if batch.views[1].valid[i].any()]
    assert drawn
    for i in drawn:
        for picture in rows[i]:
            assert picture.shape == (32 * scale, 32 * scale, 3)
            assert (picture == yellow).all(axis=2).sum() > 50  # the chosen one
        assert not (rows[i][0] == rows[i][2]).all()  # the noise grows

    do_pretrain(config("run"))
    weights = str(tmp_path / "run/model_final.pth")
    trained = model_pictures(cfg, batch, weights)
    assert any((rows[i][2] != trained[i][2]).any() for i in drawn)
    with pytest.raises(UserError, match="none.pth is missing"):
        model_pictures(cfg, batch, str(tmp_path / "none.pth"))


def test_a_method_without_pictures_is_an_error(config):
    batch = first_views(config("batch"), 1)
    soco = LazyConfig.load(str(ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"))
    with pytest.raises(UserError, match="SoCo draws no pictures of its own"):
        model_pictures(soco, batch)


def test_mixed_precision_and_micro_batches_train(config, tmp_path):
    do_pretrain(
        config("mixed", "train.amp.enabled=True", "train.accumulate_steps=2", "train.max_iter=2")
    )
    losses = metrics(tmp_path / "mixed")
    assert len(losses) == 2 and all(np.isfinite(x["total_loss"]) for x in losses.values())
    saved = torch.load(tmp_path / "mixed/model_final.pth", weights_only=True)["pretraining"]
    assert saved["image_queue.pointer"] == 8  # every micro-batch's keys


def test_the_command_line_draws_the_methods_picture(config, tmp_path, monkeypatch, capsys):
    path, picture = str(tmp_path / "config.yaml"), tmp_path / "candidates.png"
    LazyConfig.save(config("drawn"), path)

    def run(*options: str) -> None:
        fixed = ["--config-file", path, "--num", "2", "--height", "60", "--output", str(picture)]
        monkeypatch.setattr(sys, "argv", ["visualize.py", *fixed, *options])
        runpy.run_path(str(ROOT / "tools/visualize.py"), run_name="__main__")

    run("--method")
    assert capsys.readouterr().out.strip().endswith("2 images, 212 x 144 pixels")
    assert picture.exists()
    with pytest.raises(SystemExit, match="2"):
        run("--weights", "a.pth")
    assert "error: --weights requires --method" in capsys.readouterr().err
