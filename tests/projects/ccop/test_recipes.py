"""Facts of CCOP's recipes."""

import pytest
from recipe_checks import check_views_and_schedule, load_recipe, recipe_names

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "ccop_r18-fpn_b32_shapes": ([64, 64], 1e-4, 0.0),
    "ccop_r50-fpn_8xb32-200ep_coco": ([224, 224], 1e-4, 0.0),
    "ccop_r50-fpn_8xb32-800ep_coco": ([224, 224], 1e-4, 0.0),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("CCOP") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("CCOP", name), *RECIPES[name])
