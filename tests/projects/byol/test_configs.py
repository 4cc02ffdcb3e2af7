"""Facts of BYOL's recipes."""

import pytest
from detectron2.config import instantiate
from recipe_checks import (
    check_byol_augmentation,
    check_views_and_schedule,
    load_recipe,
    recipe_names,
)

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "byol_r18_b32_shapes": ([64, 64], 0.01, 0.0),
    "byol_r50_32xb128-40ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_32xb128-100ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_32xb128-300ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_32xb128-1000ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_8xb128-800ep_coco": ([224, 224], 0.0, 0.0),
    "byol_vit-b_8xb128-100ep_imagenet": ([224, 224], 0.0, 0.01),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("BYOL") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("BYOL", name), *RECIPES[name])


#: DeepMind's presets: epochs -> learning rate per 256 images, weight decay, target momentum.
PRESETS = {
    40: (0.45, 1e-6, 0.97),
    100: (0.45, 1e-6, 0.99),
    300: (0.3, 1e-6, 0.99),
    1000: (0.2, 1.5e-6, 0.996),
}


def test_every_preset_has_a_recipe():
    published = {f"byol_r50_32xb128-{epochs}ep_imagenet" for epochs in PRESETS}
    assert {name for name in RECIPES if "r50" in name and "imagenet" in name} == published


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "preset"),
    [
        *((f"byol_r50_32xb128-{e}ep_imagenet", e, 4096, p) for e, p in PRESETS.items()),
        # As many images as 74 epochs of ImageNet: the preset for 100.
        ("byol_r50_8xb128-800ep_coco", 800, 1024, PRESETS[100]),
    ],
)
def test_facts_of_the_recipes(name, epochs, batch, preset):
    cfg = load_recipe("BYOL", name)
    lr, weight_decay, momentum = preset
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == batch
    assert (cfg.optimizer.lr, cfg.train.base_batch_size) == (lr, 256)
    assert cfg.optimizer.params.weight_decay == weight_decay
    schedule = instantiate(cfg.model.momentum)
    assert schedule(0.0) == momentum and schedule(0.999999) == pytest.approx(1)
    for head, channels in ((cfg.model.projector, 2048), (cfg.model.predictor, 256)):
        assert (head.input_dim, head.hidden_dim, head.output_dim) == (channels, 4096, 256)
    views = cfg.dataloader.train.dataset.views
    check_byol_augmentation(views.first_photometry, views.second_photometry)
