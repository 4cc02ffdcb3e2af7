"""Values of the recipes."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from region_pretrain.config import CONFIG_ROOT

CONFIGS = CONFIG_ROOT.parent / "projects/CCOP/configs"


@pytest.mark.parametrize(
    ("name", "epochs", "iterations"),
    [
        ("ccop_r50-fpn_8xb32-800ep_coco", 800, 369_600),
        ("ccop_r50-fpn_8xb32-200ep_coco", 200, 92_400),
    ],
)
def test_values_of_the_coco_recipes(name, epochs, iterations):
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    batch = cfg.dataloader.train.total_batch_size
    assert batch == 8 * 32 and 118_287 // batch * epochs == iterations
    assert cfg.train.epochs == epochs and not cfg.train.amp.enabled
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == 0.3
    model, dataset = cfg.model, cfg.dataloader.train.dataset
    assert dataset.recipe == "ccop-v1" and dataset.allow_ground_truth is False
    assert dataset.names == "coco_2017_train_images"
    assert (model.temperature, model.margin, model.max_pair_iou) == (0.2, 0.4, 0.05)
    assert [model[f"{n}_weight"] for n in ("image", "inter", "intra")] == [1, 1, 1]
    assert (model.anchor, model.num_candidates, model.hardest) == ("column", 10, True)
    assert model.shuffle and model.seed == cfg.train.seed == 0
    assert instantiate(model.momentum)(0.0) == instantiate(model.momentum)(0.9999) == 0.999
    assert list(model.level_scales) == [48, 96, 192, 224]
    assert tuple(model.curriculum.center) == (0.15, 0.6)
    assert tuple(model.curriculum.log_size) == (0.35, 1.4)
    assert tuple(model.curriculum.iou_floor) == (0.8, 0.4)
    views = dataset.views
    assert (views.size, views.min_visible, views.min_area) == (224, 0.6, 144)
    assert [tuple(area) for area in views.crop_areas] == [(0.1, 1.0)] * 2
    light = views.photometry
    assert (light.brightness, light.contrast, light.saturation, light.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (light.jitter_prob, light.gray_prob, light.blur_prob) == (0.8, 0.2, 0.5)
    assert tuple(light.blur_sigma) == (0.1, 2.0) and "solarize_prob" not in light


def test_the_learning_rate():
    cfg = LazyConfig.load(str(CONFIGS / "ccop_r50-fpn_8xb32-800ep_coco.py"))
    multiplier = instantiate(cfg.lr_multiplier)

    def lr(iteration):
        return 0.3 * multiplier(iteration / 369_600)

    assert lr(0) == pytest.approx(3e-5)
    assert lr(2310) == pytest.approx(0.15, abs=1e-4)  # epoch 5
    assert lr(184_800) == pytest.approx(0.15, abs=1e-6)  # epoch 400: the cosine starts at epoch 0
    assert lr(369_600) == pytest.approx(0, abs=1e-9)


def test_weight_decay_reaches_norms_and_biases():
    cfg = LazyConfig.load(str(CONFIGS / "ccop_r18-fpn_b32_shapes.py"))
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm2d(2))
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    decays = {p: g.get("weight_decay") for g in optimizer.param_groups for p in g["params"]}
    assert len(decays) == 4 and set(decays.values()) == {1e-4}
    assert optimizer.defaults["momentum"] == 0.9
