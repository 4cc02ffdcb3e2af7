"""Pictures during a run: what they show, and that the run does not notice them."""

from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from forked import run_tool
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from region_pretrain.config import load_config
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import FailedElsewhere
from region_pretrain.errors import UserError
from region_pretrain.projects.soco import SoCoViews
from region_pretrain.reporting import training_pictures
from region_pretrain.reporting.pictures import (
    first_records,
    ground_truth_pictures,
    pictures,
    sheet,
)
from region_pretrain.reporting.training_pictures import PicturesHook

ROOT = Path(__file__).parents[2]
SHORT = [
    "train.max_iter=2",
    "train.device=cpu",
    "train.log_period=1",
    "train.writers=[json,tensorboard]",
    "dataloader.train.num_workers=0",
]


def images(folder):
    """Name -> (step, picture) of each image in TensorBoard's events."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    return {
        tag: [(e.step, cv2.imdecode(np.frombuffer(e.encoded_image_string, np.uint8), 1)[..., ::-1])
              for e in events.Images(tag)]
        for tag in events.Tags()["images"]
    }  # fmt: skip


def weights(folder):
    data = torch.load(folder / "model_final.pth", weights_only=True)
    return {**data["model"], **data.get("pretraining", {})}, data["rng"]


def assert_same_run(first, second):
    (ours, rng), (plain, other) = weights(first), weights(second)
    assert ours.keys() == plain.keys()
    for name, value in ours.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(plain[name])), name
    assert torch.equal(rng[0]["torch"], other[0]["torch"])
    assert rng[0]["python"] == other[0]["python"]


@pytest.mark.parametrize(
    "config, own",
    [
        ("SoCo/configs/soco_r18-fpn_b32_shapes.py", False),
        ("CCOP/configs/ccop_r18-fpn_b32_shapes.py", True),
        ("MCL/configs/mcl_r18-fpn_b32_shapes.py", False),
        ("PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py", True),
    ],
)
def test_a_pretraining_with_pictures_is_the_same_run(tmp_path, region_folder, config, own):
    def run(name, *more):
        overrides = [
            *SHORT,
            f"dataloader.train.dataset.names=folder://{region_folder.images}",
            f"dataloader.train.dataset.regions={region_folder.store}",
            "dataloader.train.total_batch_size=4",
            f"train.output_dir={tmp_path / name}",
            *(["dataloader.train.dataset.recipe=shapes-v1"] if "CCOP" in config else []),
            *more,
        ]
        cfg = load_config(str(ROOT / "projects" / config), overrides)
        do_pretrain(cfg)
        return cfg

    cfg = run("with", "train.pictures.period=1", "train.pictures.num_images=2")
    run("without")
    assert_same_run(tmp_path / "with", tmp_path / "without")
    assert images(tmp_path / "without") == {}
    found = images(tmp_path / "with")
    assert found.keys() == {"pictures/views"} | ({"pictures/method"} if own else set())
    assert all([step for step, _ in entries] == [0, 1] for entries in found.values())
    loader = instantiate(cfg.dataloader.train)
    for step, picture in found["pictures/views"]:
        expected = sheet(pictures(cfg, loader.first_images(step, 2)))
        assert (picture == expected).all()
    if own:  # the same images
        first, second = (picture for _, picture in found["pictures/method"])
        assert first.shape == second.shape and (first != second).any()


def test_two_processes_draw_a_picture_that_needs_both(tmp_path, region_folder):
    """CCOP's key network shuffles the images of all processes."""
    overrides = [
        *SHORT,
        f"dataloader.train.dataset.names=folder://{region_folder.images}",
        f"dataloader.train.dataset.regions={region_folder.store}",
        "dataloader.train.dataset.recipe=shapes-v1",
        "dataloader.train.total_batch_size=4",
        "train.pictures.period=1",
        f"train.output_dir={tmp_path / 'run'}",
    ]
    config = str(ROOT / "projects/CCOP/configs/ccop_r18-fpn_b32_shapes.py")
    command = ["pretrain_net.py", "--num-gpus", 2, "--config-file", config, *overrides]
    done = run_tool(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = images(tmp_path / "run")
    assert [step for step, _ in found["pictures/method"]] == [0, 1]
    one_row = found["pictures/method"][0][1].shape[0]
    assert one_row == sheet([[np.zeros((9, 9, 3), np.uint8)]] * 2).shape[0]  # 2 images each


def test_a_picture_that_only_the_main_process_cannot_lay_out_is_given_up_by_all(monkeypatch):
    """Otherwise the others would draw the method's picture again, and wait for it."""
    entered = []

    @contextmanager
    def fail_together():
        entered.append(1)
        yield
        raise FailedElsewhere("rank 0")

    monkeypatch.setattr(training_pictures, "fail_together", fail_together)
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    hook = training_pictures.PicturesHook(1, 1)
    rows = [[np.zeros((4, 4, 3), np.uint8)]]
    hook._put("method", lambda: rows)
    assert entered == [1] and hook._given_up == {"method"}
    hook._put("views", lambda: rows)  # which only the main process draws
    assert entered == [1] and hook._given_up == {"method"}


def test_a_fine_tuning_with_pictures_is_the_same_run(tmp_path, coco_folder):
    def run(name, *more):
        data = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
        overrides = [
            *SHORT,
            f"dataloader.train.dataset.names={data}",
            f"dataloader.test.dataset.names={data}",
            "dataloader.train.total_batch_size=2",
            "train.eval_period=0",
            f"train.output_dir={tmp_path / name}",
            *more,
        ]
        cfg = load_config(str(ROOT / "configs/detection/mask_rcnn_r18_fpn_shapes.py"), overrides)
        do_train(cfg)
        return cfg

    cfg = run("with", "train.pictures.period=2", "train.pictures.num_images=3")
    run("without")
    assert_same_run(tmp_path / "with", tmp_path / "without")
    ((step, picture),) = images(tmp_path / "with")["pictures/detections"]
    truth = sheet([[p] for p in ground_truth_pictures(cfg, first_records(cfg, 3))])
    width = truth.shape[1] - 8
    assert step == 1 and picture.shape[1] > 2 * width - 16
    assert (picture[:, :width] == truth[:, :width]).all()


@pytest.mark.parametrize("fails", [True, False])
def test_a_picture_that_fails_or_is_empty_does_not_end_the_run(
    tmp_path, region_folder, monkeypatch, fails
):
    def draw(self, batch):
        if fails:
            raise ValueError("no colours left")
        return []

    monkeypatch.setattr(SoCoViews, "pictures", draw)
    overrides = [
        *SHORT,
        f"dataloader.train.dataset.names=folder://{region_folder.images}",
        f"dataloader.train.dataset.regions={region_folder.store}",
        "dataloader.train.total_batch_size=2",
        "train.pictures.period=1",
        f"train.output_dir={tmp_path / 'run'}",
    ]
    path = str(ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")
    do_pretrain(load_config(path, overrides))
    log = (tmp_path / "run" / "log.txt").read_text()
    assert log.count("no pictures of views: ValueError: no colours left") == fails
    assert log.count("no pictures of views") == fails
    assert (tmp_path / "run" / "model_final.pth").exists()


def test_the_number_of_images_is_checked():
    with pytest.raises(UserError, match="train.pictures.num_images=0: must be at least 1"):
        PicturesHook(1, 0)
