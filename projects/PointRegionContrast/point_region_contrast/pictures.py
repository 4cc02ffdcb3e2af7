"""Pictures of the points of regions, and of a point's affinities."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import cycle, islice

import cv2
import numpy as np
from torch import Tensor

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.reporting.boxes import draw_boxes
from region_pretrain.reporting.pictures import view_pixels

_SHOWN = 12  # places per pair of views
_POINT = (0, 235, 235)


@cache
def _palette() -> list[list[int]]:
    from matplotlib import colormaps  # slow, and not needed in a training

    return (255 * np.array(colormaps["tab20"].colors)).astype(int).tolist()


def _colours(count: int) -> list[list[int]]:
    return list(islice(cycle(_palette()), count))


def draw_points(
    image: np.ndarray,
    points: np.ndarray,
    colours: Sequence[Sequence[int]],
    labels: Sequence[str] | None = None,
) -> np.ndarray:
    """Draw points and their labels.

    Args:
        image: (H, W, 3) uint8 RGB; a small image is enlarged.
        points: (N, 2) x and y in pixels of the image.
        colours: N RGB colours in 0-255.
        labels: N short texts.

    Returns:
        (H', W', 3) uint8 RGB; H' / H = W' / W is an integer.
    """
    picture = draw_boxes(image, np.zeros((0, 4)))
    scale = picture.shape[1] / image.shape[1]
    centers = np.rint(points * scale).astype(int).tolist()
    for i, (center, colour) in enumerate(zip(centers, colours, strict=True)):
        cv2.circle(picture, center, 5, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
        cv2.circle(picture, center, 4, tuple(map(int, colour)), cv2.FILLED, cv2.LINE_AA)
        if labels is not None:
            _write(picture, labels[i], (center[0] + 6, center[1] + 4))
    return picture


def _write(picture: np.ndarray, text: str, corner: tuple[int, int]) -> None:
    for colour, thickness in (((0, 0, 0), 3), ((255, 255, 255), 1)):
        cv2.putText(
            picture, text, corner, cv2.FONT_HERSHEY_SIMPLEX, 0.45, colour, thickness, cv2.LINE_AA
        )


def draw_views(batch: ViewBatch, slots: int) -> list[list[np.ndarray]]:
    """Draw the points of each image of a batch.

    Args:
        batch: from :class:`~region_pretrain.projects.point_region_contrast.PointRegionViews`.
        slots: number of slots that are points of regions.

    Returns:
        For each image a row of (H, W, 3) uint8 RGB: query and key view with the points of regions,
        one colour per region; and if there is a partner, query view and partner with some of their
        shared places, one colour and number per place.
    """
    pixels = [view_pixels(view) for view in batch.views]
    rows = []
    for i in range(len(batch)):
        shown = np.unique(batch.views[0].region_ids[i, :slots][batch.views[0].valid[i, :slots]])
        colour = dict(zip(shown.tolist(), _colours(len(shown)), strict=True))
        row = []
        for view, images in zip(batch.views[:2], pixels, strict=False):
            valid = view.valid[i, :slots]
            ids = view.region_ids[i, :slots][valid].tolist()
            xy = view.boxes[i, :slots][valid][:, :2].numpy()
            row.append(draw_points(images[i], xy, [colour[id_] for id_ in ids]))
        if len(batch.views) > 2:
            there = np.flatnonzero(batch.views[2].valid[i].numpy())
            few = there[np.linspace(0, len(there) - 1, min(_SHOWN, len(there))).astype(int)]
            numbers = [str(n + 1) for n in range(len(few))]
            for v, at in ((0, slots + few), (2, few)):
                xy = batch.views[v].boxes[i, at, :2].numpy()
                row.append(draw_points(pixels[v][i], xy, _colours(len(few)), numbers))
        rows.append(row)
    return rows


def draw_affinities(
    query_view: View,
    key_view: View,
    places: Tensor,
    valid: Tensor,
    student: Tensor,
    teacher: Tensor,
) -> list[list[np.ndarray]]:
    """Draw one point per image and its affinities.

    Args:
        query_view, key_view: the images' views.
        places: ``(B, M, 2)`` points in pixels of the query view.
        valid: ``(B, M)`` bool.
        student, teacher: ``(B, M, cells, cells)`` affinities to the key view's cells, summing to 1.

    Returns:
        For each image the query view with the point closest to its middle, and the key view under
        the affinity maps of student and teacher: the brighter, the higher. The number is the ratio
        of the highest affinity to that of a uniform map.
    """
    queries, keys = view_pixels(query_view), view_pixels(key_view)
    rows = []
    for i in range(len(queries)):
        if not valid[i].any():
            rows.append(
                [
                    draw_points(image, np.zeros((0, 2)), [])
                    for image in (queries[i], keys[i], keys[i])
                ]
            )
            continue
        middle = np.array(queries[i].shape[1::-1]) / 2
        distance = ((places[i].numpy() - middle) ** 2).sum(axis=1)
        chosen = int(np.where(valid[i].numpy(), distance, np.inf).argmin())
        row = [draw_points(queries[i], places[i, chosen : chosen + 1].numpy(), [_POINT])]
        for maps in (student, teacher):
            row.append(_draw_heat(keys[i], maps[i, chosen].cpu().numpy()))
        rows.append(row)
    return rows


def _draw_heat(image: np.ndarray, affinity: np.ndarray) -> np.ndarray:
    picture = draw_boxes(image, np.zeros((0, 4)))
    heat = cv2.resize(affinity, picture.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    levels = (255 * heat / heat.max()).clip(0, 255).astype(np.uint8)
    colours = cv2.applyColorMap(levels, cv2.COLORMAP_INFERNO)[..., ::-1]
    grey = picture.mean(axis=2, keepdims=True)
    mixed = np.clip(0.65 * colours + 0.35 * grey, 0, 255).astype(np.uint8)
    _write(mixed, f"x{affinity.max() * affinity.size:.1f}", (6, mixed.shape[0] - 8))
    return mixed
