"""Measures of what features distinguish within an image, against restatements."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T

from region_pretrain.evaluation.scenes import SECOND_VIEW, retrieve, variance_within

IMAGES = torch.tensor([4, 0, 0, 0, 2, 2])


def test_retrieval_is_a_search_among_the_regions_of_the_image():
    torch.manual_seed(0)
    first = torch.randn(6, 5)
    second = torch.randn(6, 5)
    hits = 0
    for group in ([1, 2, 3], [4, 5]):  # image 4 has a single region, which is not counted
        for i in group:
            similar = [float(F.cosine_similarity(first[i], second[j], dim=0)) for j in group]
            hits += group[int(np.argmax(similar))] == i
    found = retrieve(first, 3 * second, IMAGES)
    assert 0 < hits < 5
    assert found == (hits / 5, 2 / 5, 5)
    assert retrieve(first, first, IMAGES).top1 == 1.0
    assert retrieve(first, second, torch.arange(6)) is None


def test_variance_within_images():
    torch.manual_seed(0)
    features = torch.randn(6, 5)
    unit = F.normalize(features, dim=1).double().numpy()
    within = sum(((unit[g] - unit[g].mean(0)) ** 2).sum() for g in ([1, 2, 3], [4, 5]))
    total = ((unit - unit.mean(0)) ** 2).sum()
    expected = (within / (6 - 3)) / (total / 5)
    assert variance_within(features, IMAGES) == pytest.approx(expected, rel=1e-6)
    assert variance_within(features, torch.arange(6)) is None
    assert variance_within(torch.ones(6, 5), IMAGES) is None


def test_variance_within_is_one_for_noise_and_zero_for_one_vector_per_image():
    torch.manual_seed(0)
    images = torch.arange(500).repeat_interleave(4)
    noise = torch.randn(2000, 32)
    assert variance_within(noise, images) == pytest.approx(1.0, abs=0.01)
    assert variance_within(noise[images], images) == pytest.approx(0.0, abs=1e-12)


def test_second_view_moves_boxes_with_the_pixels():
    image = np.full((40, 80, 3), 100, np.uint8)
    image[8:16, 4:24] = 200
    inputs = T.AugInput(image, boxes=np.array([[4.0, 8.0, 24.0, 16.0]]))
    T.AugmentationList(SECOND_VIEW)(inputs)
    assert inputs.image.shape == (30, 60, 3)
    assert inputs.boxes.tolist() == [[42.0, 6.0, 57.0, 12.0]]  # mirrored: x in 56-76, times 0.75
    box = inputs.image[6:12, 42:57, 0].astype(float)
    rest = inputs.image[15:, :40, 0].astype(float)
    assert box.mean() - rest.mean() == pytest.approx(100 * 0.7 * 1.2, abs=6)
