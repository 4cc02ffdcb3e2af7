"""Boxes of clusters of a feature map, compared with a slow restatement in NumPy."""

import numpy as np
import pytest
import torch

from region_pretrain.regions.cluster_boxes import cluster_boxes, component_boxes, spherical_kmeans


def slow_kmeans(vectors, k):
    chosen = [int(np.argmin(vectors @ vectors.mean(axis=0)))]
    while len(chosen) < k:
        best = [max(float(v @ vectors[c]) for c in chosen) for v in vectors]
        chosen.append(int(np.argmin(best)))
    centers = [vectors[c] for c in chosen]
    for _ in range(10):
        nearest = [int(np.argmax([v @ c for c in centers])) for v in vectors]
        for j in range(k):
            members = [v for v, n in zip(vectors, nearest, strict=True) if n == j]
            total = np.sum(members, axis=0) if members else 0 * centers[j]
            if np.linalg.norm(total) > 0:
                centers[j] = total / np.linalg.norm(total)
    return np.array(centers)


def slow_upsample(image, size):
    """Bilinear; the centers of the corner cells are half a cell from the border."""
    (height, width), out = image.shape, np.zeros(size[::-1])
    for y in range(size[1]):
        for x in range(size[0]):
            v = min(max((y + 0.5) * height / size[1] - 0.5, 0), height - 1)
            u = min(max((x + 0.5) * width / size[0] - 0.5, 0), width - 1)
            i, j = int(v), int(u)
            i2, j2 = min(i + 1, height - 1), min(j + 1, width - 1)
            top = image[i, j] * (1 - u + j) + image[i, j2] * (u - j)
            bottom = image[i2, j] * (1 - u + j) + image[i2, j2] * (u - j)
            out[y, x] = top * (1 - v + i) + bottom * (v - i)
    return out


def slow_components(labels):
    seen, boxes = np.zeros(labels.shape, bool), set()
    for start in np.ndindex(labels.shape):
        if seen[start]:
            continue
        stack, cells = [start], []
        seen[start] = True
        while stack:
            y, x = stack.pop()
            cells.append((x, y))
            for cell in ((y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)):
                inside = all(0 <= c < n for c, n in zip(cell, labels.shape, strict=True))
                if inside and not seen[cell] and labels[cell] == labels[start]:
                    seen[cell] = True
                    stack.append(cell)
        xs, ys = zip(*cells, strict=True)
        boxes.add((min(xs), min(ys), max(xs) + 1, max(ys) + 1))
    return boxes


def features_with_objects(seed):
    """``(6, 10, 12)``: a background, two objects of one kind and one of another, and noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.normal(size=(3, 6)) * 4
    image = np.tile(kinds[0], (10, 12, 1))
    image[1:4, 1:5] = image[6:9, 2:5] = kinds[1]
    image[4:9, 7:11] = kinds[2]
    return (image + 0.3 * rng.normal(size=image.shape)).transpose(2, 0, 1).astype(np.float32)


def test_boxes_are_those_of_the_slow_restatement():
    features = [features_with_objects(seed) for seed in range(3)]
    found = cluster_boxes(torch.from_numpy(np.stack(features)), (2, 3, 5), (48, 40))
    for image, boxes in zip(features, found, strict=True):
        vectors = image.reshape(6, -1).T.astype(np.float64)
        vectors -= vectors.mean(axis=0)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        expected = set()
        for k in (2, 3, 5):
            similar = (slow_kmeans(vectors, k) @ vectors.T).reshape(k, 10, 12)
            labels = np.argmax([slow_upsample(s, (48, 40)) for s in similar], axis=0)
            expected |= slow_components(labels)
        assert set(map(tuple, boxes.tolist())) == expected


def test_objects_without_noise_have_tight_boxes():
    image = np.zeros((3, 8, 8), np.float32)
    image[0] = 1
    image[:, 2:6, 1:5] = np.array([0, 1, 0], np.float32)[:, None, None]
    image[:, 0:2, 6:8] = np.array([0, 0, 1], np.float32)[:, None, None]
    (boxes,) = cluster_boxes(torch.from_numpy(image)[None], (3,), (8, 8))
    assert set(map(tuple, boxes.tolist())) == {(0, 0, 8, 8), (1, 2, 5, 6), (6, 0, 8, 2)}


def test_components_touch_by_sides_only():
    labels = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 0]], np.uint8)
    boxes = sorted(component_boxes(labels).tolist())
    assert boxes == [[0, 0, 1, 1], [0, 0, 3, 3], [1, 1, 2, 2]]


def test_more_clusters_than_different_vectors():
    vectors = torch.tensor([[[1.0, 0.0]] * 3 + [[0.0, 1.0]]])
    centers = spherical_kmeans(vectors, 4)
    assert centers.shape == (1, 4, 2) and torch.isfinite(centers).all()
    nearest = (vectors @ centers.transpose(1, 2)).argmax(2)[0].tolist()
    assert nearest == [nearest[0]] * 3 + [1 - nearest[0]]


@pytest.mark.parametrize("batch", [1, 3])
def test_images_of_a_batch_are_independent(batch):
    features = torch.from_numpy(np.stack([features_with_objects(seed) for seed in range(3)]))
    alone = [cluster_boxes(f[None], (2, 4), (48, 40))[0] for f in features]
    together = [b for part in features.split(batch) for b in cluster_boxes(part, (2, 4), (48, 40))]
    assert all(map(np.array_equal, alone, together))
