"""Montages, compared with reference values of the method and slow restatements."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.projects.mcl import Montage
from region_pretrain.projects.mcl.montage import cut_windows, shrink, tile


def numbered(batch: int, size: int, channels: int = 3) -> torch.Tensor:
    """Constant images; the value is the index."""
    return torch.arange(batch).view(-1, 1, 1, 1).expand(batch, channels, size, size).float()


def test_canvases_of_128_images():
    montage = Montage()
    slots = montage.draw(128)
    assert [len(s) for s in slots] == [128, 128, 128, 256]
    assert montage.counts(slots) == [128, 32, 8, 4]
    pixels = torch.zeros(128, 3, 224, 224, dtype=torch.uint8)
    assert montage.canvases([pixels] * 4, slots).shape == (172, 3, 224, 224)
    assert slots[0].tolist() == list(range(128))
    for level, times in enumerate([1, 1, 1, 2]):
        assert torch.bincount(slots[level], minlength=128).tolist() == [times] * 128
    assert slots[1].tolist() != list(range(128))


def test_draws_differ_and_follow_their_generator():
    montage = Montage()
    a, b = montage.draw(128), montage.draw(128)
    assert not torch.equal(a[1], b[1]) and not torch.equal(a[3], b[3])
    torch.manual_seed(5)
    c = montage.draw(128)
    d = montage.draw(128, torch.Generator().manual_seed(5))
    assert all(torch.equal(x, y) for x, y in zip(c, d, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.data())
def test_any_batch_shows_every_image_equally_often(batch, data):
    images = [data.draw(st.integers(1, n * n)) for n in (1, 2, 4, 8)]
    montage = Montage(images_per_canvas=images)
    for slots, per_canvas, n in zip(montage.draw(batch), images, montage.ratios, strict=True):
        assert len(slots) == -(-batch // per_canvas) * n * n
        times = torch.bincount(slots, minlength=batch)
        assert len(times) == batch and times.min() >= 1 and times.max() - times.min() <= 1


def test_slots_are_row_by_row():
    """Reference: the tiles of canvas j are slots 4j to 4j + 3, the third is bottom left."""
    canvases = tile(numbered(8, 112, 1), 2)
    assert canvases.shape == (2, 1, 224, 224)
    for j, canvas in enumerate(canvases[:, 0]):
        assert (canvas[:112, :112] == 4 * j).all() and (canvas[:112, 112:] == 4 * j + 1).all()
        assert (canvas[112:, :112] == 4 * j + 2).all() and (canvas[112:, 112:] == 4 * j + 3).all()


@pytest.mark.parametrize("how", ["nearest", "area", "bilinear"])
def test_every_tile_shows_its_image(how):
    montage = Montage(size=32, shrink=how)
    views = [numbered(40, 32) + 1000 * level for level in range(4)]  # separate crops for each level
    slots = montage.draw(40)
    canvases = montage.canvases(views, slots)
    first = 0
    for level, n in enumerate(montage.ratios):
        boxes = montage.tile_boxes(level).int().tolist()
        assert len(boxes) == n * n and boxes[-1] == [32 - 32 // n, 32 - 32 // n, 32, 32]
        for slot, image in enumerate(slots[level].tolist()):
            x0, y0, x1, y1 = boxes[slot % (n * n)]
            seen = canvases[first + slot // (n * n), :, y0:y1, x0:x1]
            torch.testing.assert_close(seen, torch.full_like(seen, image + 1000 * level))
        first += montage.counts(slots)[level]
    assert first == len(canvases)


@pytest.mark.parametrize("ratio", [2, 8])
def test_nearest_keeps_the_first_pixel_of_each_block(ratio):
    image = torch.arange(32 * 32, dtype=torch.float32).view(1, 1, 32, 32)
    small = shrink(image, ratio, "nearest")
    for y in range(32 // ratio):
        for x in range(32 // ratio):
            assert small[0, 0, y, x] == image[0, 0, ratio * y, ratio * x]
    stock = torch.nn.functional.interpolate(image, scale_factor=1 / ratio)  # mode of the release
    assert torch.equal(small, stock)


def test_area_averages_blocks_and_bilinear_is_pillows():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (16, 16), dtype=np.uint8)
    pixels = torch.from_numpy(image).float()[None, None]
    slow = np.array([[image[4 * y : 4 * y + 4, 4 * x : 4 * x + 4].mean() for x in range(4)]
                     for y in range(4)])  # fmt: skip
    np.testing.assert_allclose(shrink(pixels, 4, "area")[0, 0].numpy(), slow, rtol=1e-5)
    pillow = np.asarray(
        Image.fromarray(image.astype(np.float32)).resize((4, 4), Image.Resampling.BILINEAR)
    )
    np.testing.assert_allclose(shrink(pixels, 4, "bilinear")[0, 0].numpy(), pillow, atol=1e-3)


def test_windows_of_a_map():
    """Reference: window (r, c) of P3 covers rows 7r to 7r + 6 and columns 7c to 7c + 6."""
    maps = torch.arange(2 * 5 * 28 * 28).view(2, 5, 28, 28)
    windows = cut_windows(maps, 7)
    assert windows.shape == (2 * 16, 5, 7, 7)
    for k in range(2):
        for r in range(4):
            for c in range(4):
                seen = maps[k, :, 7 * r : 7 * r + 7, 7 * c : 7 * c + 7]
                assert torch.equal(windows[16 * k + 4 * r + c], seen)
    assert torch.equal(tile(windows, 4), maps)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(ratios=[1, 3, 4, 8]), "3 does not divide montage.size=224"),
        (dict(ratios=[2, 1], images_per_canvas=[4, 1]), "ascending"),
        (dict(ratios=[]), "ascending"),
        (dict(images_per_canvas=[1, 4, 16, 65]), "images_per_canvas"),
        (dict(images_per_canvas=[1, 4, 16]), "images_per_canvas"),
        (dict(shrink="lanczos"), "montage.shrink=lanczos: must be one of nearest, area, bilinear"),
    ],
)
def test_invalid_montages_are_reported(arguments, message):
    with pytest.raises(UserError, match=message):
        Montage(**arguments)
