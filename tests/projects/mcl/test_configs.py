"""Facts of MCL's recipes."""

import pytest
from recipe_checks import (
    check_byol_augmentation,
    check_views_and_schedule,
    load_recipe,
    recipe_names,
)

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "mcl_r18-fpn_b32_shapes": ([112] * 6, 0.01, 6.25e-6),
    "mcl-supervised_r18-fpn_b32_shapes": ([112] * 6, 0.01, 6.25e-6),
    "mcl_r50-fpn_32xb128-100ep_imagenet": ([224] * 8, 1e-4, 6.25e-6),
    "mcl_r50-fpn_8xb128-100ep_imagenet": ([224] * 8, 1e-4, 2.5e-5),
    "mcl_r50-fpn_32xb128-530ep_coco": ([224] * 8, 1e-4, 6.25e-6),
    "mcl_r50_32xb128-100ep_imagenet": ([224] * 8, 1e-4, 6.25e-6),
    "mcl-supervised_r50-fpn_32xb128-100ep_imagenet": ([224] * 8, 1e-4, 6.25e-6),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("MCL") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("MCL", name), *RECIPES[name])


@pytest.mark.parametrize(
    ("name", "batch", "lr", "iterations"),
    [
        ("mcl_r50-fpn_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
        ("mcl_r50-fpn_8xb128-100ep_imagenet", 1024, 4.0, 125_100),
        ("mcl_r50-fpn_32xb128-530ep_coco", 4096, 16.0, 31_270),
        ("mcl_r50_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
        ("mcl-supervised_r50-fpn_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
    ],
)
def test_facts_of_the_recipes(name, batch, lr, iterations):
    cfg = load_recipe("MCL", name)
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == lr
    images = 241_690 if "coco" in name else 1_281_167
    per_epoch = images // batch
    assert per_epoch * cfg.train.epochs == iterations
    # 10 epochs of ImageNet are 3,120 steps of 4096; the release has 3,127 of 31,200.
    warmup = cfg.lr_multiplier.warmup_epochs * per_epoch * batch / 4096
    assert warmup == pytest.approx(3_127, rel=5e-3)
    assert lr * cfg.lr_multiplier.final_factor == pytest.approx(1e-4)
    assert lr * cfg.lr_multiplier.warmup_factor == pytest.approx(1e-4 * lr)
    assert (cfg.optimizer.momentum, cfg.optimizer.trust_coefficient) == (0.9, 0.001)
    assert cfg.optimizer.params.weight_decay == 1e-5 and cfg.optimizer.form == "original"
    assert not cfg.optimizer.params.released_exclusions
    assert cfg.train.clip_grad.enabled and cfg.train.clip_grad.max_norm == 500
    model, views = cfg.model, cfg.dataloader.train.dataset.views
    assert list(model.level_weights) == [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    if "supervised" not in name:
        assert (model.temperature, model.pairing, model.momentum.start) == (1.0, "top", 0.99)
    assert model.compute == "windows" and list(model.head.fc_dims) == []
    montage = views.montage
    assert (montage.size, montage.shrink) == (224, "nearest")
    assert list(montage.ratios) == [1, 2, 4, 8]
    assert list(montage.images_per_canvas) == [1, 4, 16, 32]
    assert tuple(views.crop_area) == (0.2, 1.0)
    check_byol_augmentation(views.query_photometry, views.key_photometry)
