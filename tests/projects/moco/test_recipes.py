"""Facts of MoCo v2's recipes."""

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from recipe_checks import check_views_and_schedule, load_recipe, recipe_names

from region_pretrain.data.photometry import PhotometryLayout

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "moco-v2_r18_b32_shapes": ([64, 64], 1.0, 0.0),
    "moco-v1_r50_8xb32-200ep_imagenet": ([224, 224], 1.0, 0.01),
    "moco-v2_r50_8xb32-200ep_imagenet": ([224, 224], 1.0, 0.0),
    "moco-v2_r50_8xb32-800ep_imagenet": ([224, 224], 1.0, 0.0),
    "moco-v2_r50_8xb32-800ep_coco": ([224, 224], 1.0, 0.0),
    "moco-v2_swin-t_8xb128-100ep_imagenet": ([224, 224], 0.0, 0.01),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("MoCo") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("MoCo", name), *RECIPES[name])


@pytest.mark.parametrize("epochs", [200, 800])
def test_version_2_on_imagenet(epochs):
    cfg = load_recipe("MoCo", f"moco-v2_r50_8xb32-{epochs}ep_imagenet")
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == 256
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (0.03, 1e-4)
    assert (cfg.model.temperature, cfg.model.queue.length) == (0.2, 65_536)
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.5) == pytest.approx(0.5)  # a cosine


def test_version_1():
    cfg = load_recipe("MoCo", "moco-v1_r50_8xb32-200ep_imagenet")
    assert (cfg.train.epochs, cfg.optimizer.lr, cfg.model.temperature) == (200, 0.03, 0.07)
    multiplier = instantiate(cfg.lr_multiplier)
    found = [multiplier(epoch / 200) for epoch in (0, 119.9, 120.1, 159.9, 160.1, 199.9)]
    assert found == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    with torch.device("meta"):
        head = instantiate(cfg.model).head
    assert [tuple(p.shape) for p in head.parameters()] == [(128, 2048), (128,)]
    views, at = cfg.dataloader.train.dataset.views, PhotometryLayout
    assert tuple(views.crop_area) == (0.2, 1.0)
    for photometry in (views.first_photometry, views.second_photometry):
        rng = np.random.default_rng(0)
        rows = np.stack([instantiate(photometry).sample(rng) for _ in range(2_000)])
        assert not rows[:, at.BLUR_SIGMA].any() and np.isinf(rows[:, at.SOLARIZE_FROM]).all()
        factors = rows[:, [at.BRIGHTNESS, at.CONTRAST, at.SATURATION]]
        assert (factors.min(), factors.max()) == pytest.approx((0.6, 1.4), abs=0.01)
        assert np.abs(rows[:, at.HUE]).max() == pytest.approx(0.4, abs=0.01)
        assert (rows[:, at.HUE] != 0).all()  # the jitter is always applied
        assert rows[:, at.GRAY].mean() == pytest.approx(0.2, abs=0.04)
