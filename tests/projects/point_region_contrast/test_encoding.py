"""Points are at the right locations, checked on images whose pixels encode their own position."""

import cv2
import numpy as np
import pytest

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.projects.point_region_contrast.views import PLACE_IDS

WIDTH, HEIGHT = 240, 160  # less than 256, so that bytes can encode x and y


@pytest.fixture(scope="module")
def read_back(tmp_path_factory, make_views):
    """``read_back(**settings)``: a batch of such images, and the positions decoded at its slots."""
    folder = tmp_path_factory.mktemp("encoded")
    y, x = np.indices((HEIGHT, WIDTH))
    image = np.stack([x, y, np.full_like(x, 200)], axis=2).astype(np.uint8)  # RGB
    for i in range(40):
        cv2.imwrite(str(folder / f"{i:02d}.png"), image[..., ::-1])

    def read(**settings):
        views = make_views(size=112, cells=28, num_regions=16, points=16, **settings)
        batch = PretrainDataset(f"folder://{folder}", views).batch(3, 0, range(40))
        decoded = []
        for view in batch.views:
            at = view.boxes[..., :2].numpy().astype(int).clip(0, 111)
            of = np.arange(len(batch))[:, None]
            pixels = view.images.permute(0, 2, 3, 1).numpy()[of, at[..., 1], at[..., 0]]
            decoded.append(pixels[..., :2].astype(float) + 0.5)  # the centre of the pixel
        return batch, decoded

    return read


def test_points_decode_to_the_drawn_cell_in_both_views_flips_included(read_back):
    batch, decoded = read_back()
    flips = 0
    for view, xy in zip(batch.views[:2], decoded[:2], strict=True):
        slots = slice(0, 256)
        cell = (
            4 * np.floor(4 * xy[:, slots, 1] / HEIGHT) + np.floor(4 * xy[:, slots, 0] / WIDTH) + 1
        )
        drawn, valid = view.region_ids[:, slots].numpy(), view.valid[:, slots].numpy()
        mirrored = view.affine[:, 0, 0].numpy() < 0
        flips += mirrored.sum()
        for some in (mirrored, ~mirrored):
            right = (cell == drawn)[some][valid[some]]
            assert len(right) > 1000 and right.mean() >= 0.95
        # With x and y swapped, few points would be in their cell.
        swapped = 4 * np.floor(4 * xy[:, slots, 0] / WIDTH) + np.floor(4 * xy[:, slots, 1] / HEIGHT)
        assert (swapped + 1 == drawn)[valid].mean() < 0.5
    assert 20 < flips < 60


def test_places_of_query_and_partner_are_the_same(read_back):
    batch, decoded = read_back()
    query, _, partner = batch.views
    assert (query.region_ids[:, 256:] == partner.region_ids).all()
    assert (partner.region_ids >= PLACE_IDS).all() and partner.valid.float().mean() > 0.9
    valid = partner.valid.numpy()
    assert (query.valid[:, 256:].numpy() == valid).all()
    apart = np.linalg.norm(decoded[0][:, 256:] - decoded[2], axis=2)[valid]
    sides = [28 / np.abs(v.affine[:, [0, 1], [0, 1]].numpy()) / 7 for v in (query, partner)]
    diagonal = np.maximum(*(np.linalg.norm(side, axis=1) for side in sides))  # of a cell
    rounding = 2.0  # of bytes, and of two renderings
    assert (apart <= np.repeat(diagonal / 2, valid.sum(axis=1)) + rounding).all()


def test_points_of_locations_are_the_same_place(read_back):
    batch, decoded = read_back(positives="location", pairs=0)
    assert len(batch.views) == 2
    first, second = batch.views
    assert (first.valid == second.valid).all() and first.valid.float().mean() > 0.2
    assert (first.region_ids == second.region_ids).all()
    for i in range(40):  # one place per id
        ids, places = (t[i][first.valid[i]] for t in (first.region_ids, first.boxes[..., :2]))
        assert ((ids[:, None] == ids) == (places[:, None] == places).all(dim=2)).all()
        assert len(ids.unique()) > 0.5 * len(ids)
    apart = np.linalg.norm(decoded[0] - decoded[1], axis=2)[first.valid.numpy()]
    assert apart.max() < 3


@pytest.mark.parametrize("kind", ["kmeans", "slic"])
def test_maps_of_the_pixels_agree_between_the_views(read_back, kind):
    """Nearby pixels of similar colour have the same label in both views."""
    batch, decoded = read_back(kind=kind)
    of_query, of_key = (
        {
            (i, region): decoded[v][i, :256][
                (view.region_ids[i, :256] == region) & view.valid[i, :256]
            ]
            for i in range(40)
            for region in view.region_ids[i, :256][view.valid[i, :256]].unique().tolist()
        }
        for v, view in enumerate(batch.views[:2])
    )
    assert of_query.keys() == of_key.keys() and len(of_query) > 100
    # All images are the same, and so are their maps: a region's points are near each other.
    for region in {region for _, region in of_query}:
        points = np.concatenate(
            [xy for found in (of_query, of_key) for (_, r), xy in found.items() if r == region]
        )
        assert np.median(np.abs(points - np.median(points, axis=0)).max(axis=1)) < 45
