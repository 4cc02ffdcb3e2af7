"""Facts of MoCo v2's recipes."""

import pytest
from recipe_checks import check_views_and_schedule, load_recipe, recipe_names

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "moco-v2_r18_b32_shapes": ([64, 64], 1.0, 0.0),
    "moco-v2_r50_8xb32-200ep_imagenet": ([224, 224], 1.0, 0.0),
    "moco-v2_r50_8xb32-800ep_coco": ([224, 224], 1.0, 0.0),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("MoCo") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("MoCo", name), *RECIPES[name])
