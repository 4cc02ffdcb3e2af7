"""BYOL: its loss, two processes and its checkpoints."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from project_runs import check_stopped_run_resumes, six_steps, two_view_batch
from torch import nn

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.byol import BYOL
from region_pretrain.solver import cosine_momentum

CONFIGS = CONFIG_ROOT.parent / "projects/BYOL/configs"


def small_byol(zero_init: bool = False) -> BYOL:
    torch.manual_seed(0)
    detector = get_config("common/models/mask_rcnn_fpn_small.py").model
    return BYOL(
        backbone=Trunk(bottom_up=instantiate(detector.backbone.bottom_up)),
        feature="res5",
        projector=MLPHead(192, 32, 16),
        predictor=MLPHead(16, 32, 16),
        momentum=cosine_momentum(0.99),
        zero_init=zero_init,
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format="RGB",
    )


def test_loss_is_the_papers_squared_error_minus_four():
    model, batch = small_byol().eval(), two_view_batch()
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.mul_(1.05)
        online, target = [], []
        for view in batch.views:
            images = (view.images.float() - model.preprocess.pixel_mean) / (
                model.preprocess.pixel_std
            )
            for network, predictor, found in (
                (model.online, model.predictor, online),
                (model.target, nn.Identity(), target),
            ):
                last = network["backbone"].bottom_up(images)["res5"].mean(dim=(2, 3))
                vectors = predictor(network["projector"](last)).numpy()
                found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        squared = [np.sum((online[a] - target[1 - a]) ** 2, axis=1).mean() for a in range(2)]
        assert model(batch)["loss_image"].item() == pytest.approx(sum(squared) - 4, abs=1e-4)


def test_zero_init_zeroes_the_last_norm_of_each_block():
    for zero_init in (True, False):
        model = small_byol(zero_init)
        for network in (model.backbone, model.target["backbone"]):
            blocks = [b for s in ("res2", "res5") for b in getattr(network.bottom_up, s)]
            assert all(b.conv2.norm.weight.eq(0.0 if zero_init else 1.0).all() for b in blocks)
            assert all(b.conv1.norm.weight.eq(1).all() for b in blocks)


def test_online_learns_and_the_target_follows_the_schedule():
    model = small_byol().train()
    initial = {n: p.clone() for n, p in model.target.named_parameters()}
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(1.0)
    with EventStorage():
        model.before_step(250, 1000)
    moved = 1 - 0.991464  # 0.01 * (1 + cos(pi / 4)) / 2
    for name, parameter in model.target["projector"].named_parameters():
        expected = initial[f"projector.{name}"] + moved
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
    model(two_view_batch())["loss_image"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


@pytest.fixture
def run(region_folder, tmp_path):
    def start(name: str, resume: bool = False) -> Path:
        cfg = six_steps(
            CONFIGS / "byol_r18_b32_shapes.py",
            region_folder.images,
            tmp_path / name,
            "dataloader.train.dataset.views.size=32",
        )
        do_pretrain(cfg, resume=resume)
        return tmp_path / name

    return start


def test_a_stopped_run_resumes_bit_for_bit(run):
    check_stopped_run_resumes(run)


def test_a_checkpoint_contains_only_the_trunk(run, tmp_path):
    run("run")
    path = str(tmp_path / "run/model_final.pth")
    recipe = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    report = load_pretrained(instantiate(recipe.model), path)
    loaded = {n for n, c in report.modules.items() if c.loaded_tensors == c.tensors}
    assert loaded == {"backbone.bottom_up"} and not report.unexpected
    assert "backbone.bottom_up only" in (tmp_path / "run/log.txt").read_text()
