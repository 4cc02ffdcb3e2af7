"""Facts of point-level region contrast's recipes."""

import pytest
from recipe_checks import check_views_and_schedule, load_recipe, recipe_names

#: name -> sides of the views; first and last learning-rate multiplier.
RECIPES = {
    "point-region_r18_b32_shapes": ([64, 64, 64], 1.0, 0.0),
    "point-region_r18-fpn_b32_shapes": ([64, 64, 64], 1.0, 0.0),
    "point-region_r50_8xb32-100ep_imagenet": ([224, 224, 224], 1.0, 0.0),
    "point-region_r50_8xb32-200ep_imagenet": ([224, 224, 224], 1.0, 0.0),
    "point-region_r50_8xb32-800ep_coco": ([224, 224, 224], 1.0, 0.0),
    "point-region_r50-c4_8xb32-200ep_imagenet": ([224, 224, 224], 1.0, 0.0),
    "point-region_r50-fpn_8xb32-200ep_imagenet": ([224, 224, 224], 1.0, 0.0),
}


def test_every_recipe_is_in_the_table():
    assert recipe_names("PointRegionContrast") == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_views_and_schedule(name):
    check_views_and_schedule(load_recipe("PointRegionContrast", name), *RECIPES[name])
