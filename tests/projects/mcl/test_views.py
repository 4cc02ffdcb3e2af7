"""MCL's eight crops of an image."""

import numpy as np
import pytest
import torch

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry, PhotometryLayout
from region_pretrain.errors import UserError
from region_pretrain.projects.mcl import MCLViews, Montage

QUERY = Photometry(blur_prob=1.0)
KEY = Photometry(blur_prob=0.1, solarize_prob=0.2)


def test_eight_views_of_an_image():
    views = MCLViews(Montage(), QUERY, KEY)
    samples = views(500, 400, np.zeros((0, 4), np.float32), np.random.default_rng(0))
    assert [s.photometry for s in samples] == [QUERY] * 4 + [KEY] * 4
    assert all(s.geometry.size == (224, 224) for s in samples)
    crops = {(s.geometry.left, s.geometry.top, s.geometry.width) for s in samples}
    assert len(crops) == 8  # an independent crop for each level of each pyramid


def test_impossible_crops_are_named():
    with pytest.raises(UserError, match=r"views.crop_area=\[2, 3\] must be a range within"):
        MCLViews(Montage(), QUERY, KEY, crop_area=(2, 3))


def test_areas_aspects_and_flips():
    views = MCLViews(Montage(), QUERY, KEY)
    rng = np.random.default_rng(1)
    none = np.zeros((0, 4), np.float32)
    geometries = [s.geometry for _ in range(200) for s in views(500, 500, none, rng)]
    areas = np.array([g.width * g.height / 250_000 for g in geometries])
    aspects = np.array([g.width / g.height for g in geometries])
    assert 0.195 < areas.min() < 0.25 and 0.9 < areas.max() <= 1
    assert 0.74 < aspects.min() < 0.78 and 1.28 < aspects.max() < 1.35
    assert np.mean([g.flip for g in geometries]) == pytest.approx(0.5, abs=0.04)


def test_photometry_of_the_pyramids(region_folder):
    montage = Montage(size=32)
    data = PretrainDataset(f"folder://{region_folder.images}", MCLViews(montage, QUERY, KEY))
    batches = [data.batch(0, epoch, range(12)) for epoch in range(30)]
    assert len(batches[0].views) == 8 and batches[0].views[0].images.shape == (12, 3, 32, 32)
    at = PhotometryLayout
    for views, expected in ((slice(0, 4), (1.0, 0.0)), (slice(4, 8), (0.1, 0.2))):
        rows = torch.cat([v.photometry for b in batches for v in b.views[views]])  # 1,440 views
        blurred = (rows[:, at.BLUR_SIGMA] > 0).float().mean().item()
        solarised = rows[:, at.SOLARIZE_FROM].isfinite().float().mean().item()
        assert (blurred, solarised) == pytest.approx(expected, abs=0.04)
