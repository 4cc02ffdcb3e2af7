"""Facts of SoCo's recipes."""

import pytest
from detectron2.config import instantiate
from recipe_checks import (
    check_byol_augmentation,
    check_views_and_schedule,
    load_recipe,
    recipe_names,
)

from region_pretrain.config import changed_keys

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "soco_r18-fpn_b32_shapes": ([64, 64, 32], 0.01, 1.25e-7),
    "soco_r50-fpn_16xb128-100ep_imagenet": ([224, 224, 112], 0.01, 1.25e-7),
    "soco_r50-fpn_8xb128-100ep_imagenet": ([224, 224, 112], 0.01, 2.5e-7),
    "soco_r50-fpn_16xb128-400ep_imagenet": ([224, 224, 112], 0.01, 1.25e-7),
    "soco_r50-fpn_16xb128-530ep_coco": ([224, 224, 112], 0.01, 1.25e-7),
    "soco-star_r50-fpn_16xb128-400ep_imagenet": ([224, 224, 192, 112], 0.01, 1.25e-7),
    "soco-cutout_r50-fpn_16xb128-100ep_imagenet": ([224, 224, 112], 0.01, 1.25e-7),
    "soco-cutout_r50-c4_16xb128-100ep_imagenet": ([224, 224], 0.01, 1.25e-7),
    "soco-cutout_r50-c4_16xb128-400ep_imagenet": ([224, 224], 0.01, 1.25e-7),
    "soco_r50-c4_16xb128-100ep_imagenet": ([224, 224], 0.01, 1.25e-7),
    "soco_r50-c4_16xb128-400ep_imagenet": ([224, 224], 0.01, 1.25e-7),
    "soco_swin-t-fpn_8xb128-100ep_imagenet": ([224, 224, 112], 0.0, 0.01),
    "soco_vitdet-b_8xb128-100ep_imagenet": ([224, 224, 112], 0.0, 0.01),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("SoCo") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("SoCo", name), *RECIPES[name])


def test_sources_of_the_variants():
    sources = {
        name: list(load_recipe("SoCo", name).dataloader.train.dataset.views.sources)
        for name in RECIPES
    }
    assert sources.pop("soco-star_r50-fpn_16xb128-400ep_imagenet") == ["crop", "crop", 0]
    c4 = [sources.pop(name) for name in RECIPES if "c4" in name]
    assert c4 == [["crop"]] * 4 and list(sources.values()) == [["crop", "crop"]] * 8


@pytest.mark.parametrize("name", [name for name in RECIPES if "cutout" in name])
def test_cutout_is_all_that_differs(name):
    without, with_it = load_recipe("SoCo", name.replace("-cutout", "")), load_recipe("SoCo", name)
    changed = changed_keys(without, with_it)
    folder = changed.pop("train.output_dir")
    assert folder[1] == folder[0].replace("soco_", "soco-cutout_")
    assert {key: new for key, (_, new) in changed.items()} == {
        "dataloader.train.dataset.views.cutout_prob": "0.5"
    }
    views = instantiate(with_it.dataloader.train.dataset.views)
    assert (views.cutout_prob, views.cutout_area) == (0.5, (0.1, 0.3))
    assert instantiate(without.dataloader.train.dataset.views).cutout_prob == 0


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "iterations"),
    [
        ("soco_r50-fpn_16xb128-530ep_coco", 530, 2048, 8.0, 62_540),
        ("soco_r50-fpn_16xb128-100ep_imagenet", 100, 2048, 8.0, 62_500),
        ("soco_r50-fpn_16xb128-400ep_imagenet", 400, 2048, 8.0, 250_000),
        ("soco_r50-fpn_8xb128-100ep_imagenet", 100, 1024, 4.0, 125_100),
        ("soco-star_r50-fpn_16xb128-400ep_imagenet", 400, 2048, 8.0, 250_000),
        ("soco_r50-c4_16xb128-100ep_imagenet", 100, 2048, 8.0, 62_500),
        ("soco-cutout_r50-c4_16xb128-400ep_imagenet", 400, 2048, 8.0, 250_000),
    ],
)
def test_facts_of_the_recipes(name, epochs, batch, lr, iterations):
    cfg = load_recipe("SoCo", name)
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == lr
    images = 241_690 if "coco" in name else 1_281_167
    assert images // batch * epochs == iterations
    assert lr * cfg.lr_multiplier.final_factor == pytest.approx(1e-6)
    assert cfg.optimizer.params.weight_decay == 1e-5
    warmup = cfg.lr_multiplier.warmup_epochs * (images // batch)
    assert warmup == (6254 if "coco" in name else 10 * (images // batch))
    assert cfg.model.momentum.start == 0.99
    views = cfg.dataloader.train.dataset.views
    assert views.num_regions == 4
    check_byol_augmentation(views.first_photometry, views.other_photometry)
    if "c4" in name:
        assert tuple(views.crop_area) == (0.6, 1.0) and views.jitter_prob == 0
    else:
        assert tuple(views.crop_area) == (0.5, 1.0)
        assert (views.jitter_prob, views.jitter_ratio) == (0.5, 0.1)
        assert list(cfg.model.level_scales) == [48, 96, 192, 224]
