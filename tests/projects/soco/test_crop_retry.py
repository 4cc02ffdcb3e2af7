"""How many regions a crop must show before it is accepted: max(K // 2, 1), halved per attempt."""

import numpy as np
import pytest

from region_pretrain.data.photometry import Photometry
from region_pretrain.projects.soco import SoCoViews


class Scripted(SoCoViews):
    """Crops that show a scripted number of regions, one number per attempt."""

    def __init__(self, num_regions: int, shown: list[int]) -> None:
        light = Photometry()
        super().__init__([32, 32], ["crop"], light, light, num_regions=num_regions)
        self.shown, self.attempts = shown, 0

    def _visible(self, geometry, boxes) -> np.ndarray:
        self.attempts += 1
        return np.arange(self.shown[self.attempts - 1])


@pytest.mark.parametrize(
    ("num_regions", "shown", "attempts"),
    [
        (1, [1], 1),  # a single region is all that K = 1 can match
        (1, [0, 0, 1], 3),
        (4, [2], 1),
        (4, [1, 1], 2),  # 2, then 1
        (8, [4], 1),
        (8, [3, 2], 2),  # 4, then 2
        (8, [3, 1, 1], 3),  # 4, 2, then 1
        (16, [7, 4], 2),  # 8, then 4
        (16, [7, 3, 1, 0, 0], 5),  # 8, 4, 2, 1, 1: the last crop is used as it is
    ],
)
def test_the_demand_starts_at_half_of_k_and_halves(num_regions, shown, attempts):
    views = Scripted(num_regions, shown)
    boxes = np.tile(np.array([[5, 5, 20, 20]], np.float32), (40, 1))
    views(64, 64, boxes, np.random.default_rng(0))
    assert views.attempts == attempts
