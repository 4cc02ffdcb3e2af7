"""The views of image-level methods."""

import numpy as np
import pytest

from region_pretrain.data.photometry import Photometry
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.errors import UserError


def test_two_independent_crops_each_with_its_own_photometry():
    blurred = Photometry(blur_prob=1.0)
    views = TwoCrops(64, Photometry(), blurred, (0.2, 0.5))
    areas, flips = [], []
    for seed in range(300):
        rng = np.random.default_rng(seed)
        first, second = views(300, 200, np.zeros((5, 4), np.float32), rng)
        assert first.photometry == Photometry() and second.photometry is blurred
        for view in (first, second):
            assert view.geometry.size == (64, 64) and view.boxes.shape == (0, 4)
            assert len(view.valid) == len(view.region_ids) == 0
            areas.append(view.geometry.width * view.geometry.height / 60_000)
        flips.append(first.geometry.flip == second.geometry.flip)
        assert first.geometry != second.geometry
    assert 0.19 < min(areas) < 0.21 and 0.48 < max(areas) < 0.51
    assert np.mean(areas) == pytest.approx(0.35, abs=0.02)
    assert np.mean(flips) == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("area", [(0.0, 1.0), (0.5, 0.2), (0.2, 1.1)])
def test_an_area_outside_its_range_is_refused(area):
    with pytest.raises(UserError, match="crop_area"):
        TwoCrops(64, Photometry(), Photometry(), area)
