"""Pictures of regions: one tile per image, boxes at their places."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, write_store
from region_pretrain.regions.preview import draw_preview, preview_image


@pytest.fixture
def grey_images(tmp_path):
    """Six grey images; image ``i`` has ``i`` boxes, and the fourth is not in the store."""
    records, rows = [], []
    for i in range(6):
        path = tmp_path / f"{i}.png"
        Image.new("RGB", (100, 100), (128, 128, 128)).save(path)
        records.append({"file_name": str(path), "image_id": f"folder/{i}"})
        if i != 3:
            rows.append((f"folder/{i}", 100, 100, np.array([[20, 30, 80, 90]] * i).reshape(-1, 4)))
    write_store(str(tmp_path / "r.arrow"), rows, {"recipe": "test-v1"})
    return records, RegionStore.open(str(tmp_path / "r.arrow")), str(tmp_path / "preview.png")


def draw(*arguments) -> np.ndarray:
    with Image.open(draw_preview(*arguments)) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def coloured(pixels: np.ndarray) -> np.ndarray:
    return pixels.max(-1) - pixels.min(-1) > 60


@pytest.mark.parametrize(
    ("count", "width", "height"), [(1, 400, 400), (2, 800, 400), (5, 1600, 800), (99, 1600, 800)]
)
def test_one_tile_per_image(grey_images, count, width, height):
    records, store, out = grey_images
    assert draw(records, store, out, count).shape == (height, width, 3)


def test_box_is_drawn_on_the_borders_of_its_pixels(grey_images):
    records, store, out = grey_images
    pixels = draw(records[1:2], store, out, 1)
    grey = (np.abs(pixels - 128).max(-1) <= 2) | coloured(pixels)
    rows, columns = np.flatnonzero(grey.mean(1) > 0.5), np.flatnonzero(grey.mean(0) > 0.5)
    top, left = rows[0], columns[0]
    scale = (columns[-1] + 1 - left) / 100  # plotted pixels of an image's pixel
    y, x = np.nonzero(coloured(pixels))
    drawn = [(x.min() - left), (y.min() - top), (x.max() + 1 - left), (y.max() + 1 - top)]
    np.testing.assert_allclose(np.array(drawn) / scale, [20, 30, 80, 90], atol=1)


def test_image_without_boxes_is_only_shown(grey_images):
    records, store, out = grey_images
    assert not coloured(draw(records[:1], store, out, 1)).any()


def test_same_picture_every_time_and_a_limited_number_of_boxes(tmp_path, grey_images):
    records, _, _ = grey_images
    boxes = np.array([[i, i, i + 40, i + 40] for i in range(50)], np.float32)
    path = str(tmp_path / "many.arrow")
    write_store(path, [("folder/0", 100, 100, boxes)], {"recipe": "test-v1"})
    store = RegionStore.open(path)
    few, again, many = (
        np.asarray(preview_image(records[:1], store, 1, n)).astype(int) for n in (2, 2, 50)
    )
    np.testing.assert_array_equal(few, again)
    assert coloured(many).sum() > 5 * coloured(few).sum() > 0


def test_nothing_to_draw(grey_images):
    records, store, out = grey_images
    with pytest.raises(UserError, match="none of these images"):
        draw_preview(records[3:4], store, out, 1)
    with pytest.raises(UserError, match="at least one image"):
        draw_preview(records, store, out, 0)
