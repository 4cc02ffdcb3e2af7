"""Region maps: closed forms, label images, and wrong names."""

import cv2
import numpy as np
import pytest

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.errors import UserError
from region_pretrain.projects.point_region_contrast.maps import (
    NO_REGION,
    BoxMap,
    GridMap,
    LabelImage,
    region_maps,
)

NONE = np.zeros((0, 4), np.float32)


def test_labels_of_the_grid():
    grid = region_maps("grid")(224, 224, NONE, None)
    row_column = np.array([[0, 0], [60, 10], [55, 56], [112, 168], [223, 223]])
    assert grid(row_column[:, ::-1] + 0.5).tolist() == [1, 5, 2, 12, 16]
    # A cell of a 56 x 56 map of the whole image: x is the column. Transposed it would be 13.
    assert grid(np.array([[4 * 50 + 2.0, 4 * 5 + 2.0]])) == 4
    assert grid(np.array([[4 * 5 + 2.0, 4 * 50 + 2.0]])) == 13
    assert GridMap(300, 150, 3)(np.array([[[299.9, 149.9], [100, 49.9]]])).tolist() == [[9, 2]]
    assert GridMap(10, 10, 4)(np.array([[10.0, 10.0]])) == 16  # the border belongs to the last cell


def test_a_point_belongs_to_the_smallest_box_around_it():
    boxes = np.array([[0, 0, 100, 100], [20, 20, 40, 40], [30, 30, 90, 90]], np.float32)
    points = np.array([[5, 5], [25, 25], [35, 35], [60, 60], [150, 5], [100, 50], [20, 20]], float)
    assert BoxMap(boxes)(points).tolist() == [1, 2, 2, 3, NO_REGION, NO_REGION, 2]
    assert region_maps("boxes")(200, 200, NONE, None)(points[None]).tolist() == [[NO_REGION] * 7]


def test_a_label_image_covers_the_whole_image():
    labels = np.array([[1, 2, 3], [4, 5, 6]])
    mapped = LabelImage(labels, 300, 100)
    points = np.array([[0, 0], [99.9, 49.9], [100, 49.9], [299.9, 99.9], [300, 100]])
    assert mapped(points).tolist() == [1, 1, 2, 6, 6]


def four_colours(width: int = 240, height: int = 160) -> np.ndarray:
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2] = (200, 30, 30)
    image[: height // 2, width // 2 :] = (30, 200, 30)
    image[height // 2 :, : width // 2] = (30, 30, 200)
    image[height // 2 :, width // 2 :] = (220, 220, 60)
    noise = np.random.default_rng(0).integers(-8, 9, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("kmeans", {"clusters": 4}),
        ("kmeans", {"clusters": 4, "features": lambda image: image.astype(np.float32)}),
        ("slic", {"segments": 4, "compactness": 5.0}),
        ("felzenszwalb", {"scale": 500.0, "min_area": 0.1}),
    ],
)
def test_maps_of_pixels_find_the_colours(kind, options):
    source = region_maps(kind, **options)
    assert source.needs_pixels
    image = four_colours()
    # A file decoded at half its size, of an original of 480 x 320.
    centers = np.array([[120, 80], [360, 80], [120, 240], [360, 240]], float)
    shifts = np.random.default_rng(1).uniform(-70, 70, (50, 1, 2))
    found = source(480, 320, NONE, image)(centers + shifts)
    assert found.shape == (50, 4) and found.min() >= 1
    common = [np.bincount(column).max() for column in found.T]
    assert min(common) >= 48 and len({np.bincount(c).argmax() for c in found.T}) == 4
    again = source(480, 320, NONE, image)(centers + shifts)
    assert (again == found).all()


def test_maps_of_boxes_need_a_region_store(noise_folder, make_views):
    """Without one there would be no points, and only whole images would be contrasted."""
    with pytest.raises(UserError, match="dataset.regions is empty, but these views need regions"):
        PretrainDataset(f"folder://{noise_folder}", make_views(kind="boxes"))
    assert len(PretrainDataset(f"folder://{noise_folder}", make_views())) == 12


def test_kmeans_of_uniform_and_tiny_images():
    source = region_maps("kmeans")
    for image in (np.full((50, 70, 3), 99, np.uint8), np.zeros((1, 3, 3), np.uint8)):
        h, w = image.shape[:2]
        labels = source(w, h, NONE, image)(np.array([[0.5, 0.5], [w - 0.5, h - 0.5]]))
        assert (labels >= 1).all() and (labels <= 16).all()
    photo = cv2.resize(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8), (640, 480))
    y, x = np.mgrid[2:480:4, 2:640:4]
    labels = source(640, 480, NONE, photo)(np.stack([x, y], axis=-1))
    assert len(np.unique(labels)) >= 12


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("gird", {}, "kind='gird': must be one of grid, boxes, .*; did you mean grid"),
        ("grid", {"clusters": 3}, "kind=grid have no option 'clusters'; options: n"),
        ("boxes", {"n": 3}, "kind=boxes have no option 'n'; options: none"),
        ("grid", {"n": 0}, "kind=grid: n=0 is not a whole number above 0"),
        ("kmeans", {"clusters": 2.5}, "clusters=2.5 is not a whole number"),
        ("slic", {"compactness": -1.0}, "compactness=-1.0 is not a number above 0"),
    ],
)
def test_wrong_names_and_values(kind, options, named):
    with pytest.raises(UserError, match=named):
        region_maps(kind, **options)
