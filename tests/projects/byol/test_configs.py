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
    "byol_r50_32xb128-300ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_32xb128-1000ep_imagenet": ([224, 224], 0.0, 0.0),
    "byol_r50_8xb128-800ep_coco": ([224, 224], 0.0, 0.0),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("BYOL") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("BYOL", name), *RECIPES[name])


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "batch", "momentum"),
    [
        ("byol_r50_32xb128-300ep_imagenet", 300, 7.2, 4096, 0.99),
        ("byol_r50_32xb128-1000ep_imagenet", 1000, 3.2, 4096, 0.996),
        ("byol_r50_8xb128-800ep_coco", 800, 1.8, 1024, 0.99),
    ],
)
def test_facts_of_the_recipes(name, epochs, lr, batch, momentum):
    cfg = load_recipe("BYOL", name)
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == pytest.approx(lr)
    assert cfg.optimizer.params.weight_decay == 1.5e-6
    schedule = instantiate(cfg.model.momentum)
    assert schedule(0.0) == momentum and schedule(0.999999) == pytest.approx(1)
    for head, channels in ((cfg.model.projector, 2048), (cfg.model.predictor, 256)):
        assert (head.input_dim, head.hidden_dim, head.output_dim) == (channels, 4096, 256)
    views = cfg.dataloader.train.dataset.views
    check_byol_augmentation(views.first_photometry, views.second_photometry)
