"""Images and regions belong together; what does not fit stops before training."""

import logging

import cv2
import numpy as np
import pytest

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.errors import UserError
from region_pretrain.regions.generate import make_regions


def test_regions_are_found_by_key(region_folder, soco_views):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    for index in range(len(data)):
        image, boxes = data._read(index)
        expected = region_folder.boxes[data._records[index][1]]
        np.testing.assert_array_equal(boxes, expected)
        assert image.shape == (64, 64, 3)


def test_another_recipe_is_refused(region_folder, soco_views):
    with pytest.raises(UserError, match="'shapes-v1'.*'soco-v1'"):
        PretrainDataset(
            f"folder://{region_folder.images}", soco_views, region_folder.store, recipe="soco-v1"
        )


def test_a_store_of_other_images_is_refused(region_folder, soco_views, tmp_path):
    (tmp_path / "others").mkdir()
    cv2.imwrite(str(tmp_path / "others" / "other.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="1 of the 1 images"):
        PretrainDataset(f"folder://{tmp_path / 'others'}", soco_views, region_folder.store)


def test_a_few_missing_images_are_tolerated_and_listed(region_folder, soco_views, caplog):
    cv2.imwrite(str(region_folder.images / "late.png"), np.zeros((64, 64, 3), np.uint8))
    arguments = (f"folder://{region_folder.images}", soco_views, region_folder.store)
    with pytest.raises(UserError, match="late.png"):
        PretrainDataset(*arguments, max_unreadable=0.01)
    with caplog.at_level(logging.WARNING):
        data = PretrainDataset(*arguments, max_unreadable=0.2)
    assert len(data) == len(region_folder.boxes) and "late.png" in caplog.text


def test_an_image_of_another_size_than_its_regions_is_refused(region_folder, soco_views):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    cv2.imwrite(data._records[0][0], np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(UserError, match="64x32.*64x64"):
        data.sample(0, 0, 0)


def test_a_file_broken_during_the_run_is_replaced_by_the_next(region_folder, soco_views, caplog):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    expected = data._read(3)[0]
    with open(data._records[2][0], "wb") as f:
        f.write(b"not an image")
    with caplog.at_level(logging.WARNING):
        image, _, _ = data.sample(0, 0, 2)
    np.testing.assert_array_equal(image, expected)
    assert data._records[2][0] in caplog.text


def test_images_without_regions_are_counted(region_folder, soco_views, caplog):
    thin = np.zeros((6, 64, 3), np.uint8)  # no region can be 10 pixels high
    cv2.imwrite(str(region_folder.images / "thin.png"), thin)
    names = f"folder://{region_folder.images}"
    store = region_folder.store + ".new"
    make_regions(get_records(names), store, "shapes-v1", workers=1)
    with caplog.at_level(logging.INFO):
        data = PretrainDataset(names, soco_views, store)
    assert len(data) == 13 and len(data._read(12)[1]) == 0
    assert "1 images without regions train on the whole-image box" in caplog.text
