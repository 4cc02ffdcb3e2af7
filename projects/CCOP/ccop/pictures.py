"""Pictures of a region's candidates and of the chosen one."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from region_pretrain.data.batch import View
from region_pretrain.projects.ccop.candidates import Candidates
from region_pretrain.reporting.boxes import draw_boxes
from region_pretrain.reporting.pictures import view_pixels

REGION, VALID, INVALID, CHOSEN = (255, 255, 255), (85, 150, 255), (150, 150, 150), (255, 215, 0)


def draw_choices(
    view: View, candidates: Candidates, chosen: Sequence[int], similarity: Sequence[float]
) -> list[np.ndarray]:
    """Draw the candidates of one region per image, the one of median area.

    Args:
        view: the key view.
        candidates: ``(R, n + 1)`` candidates of the valid regions, in the order of (image, slot).
        chosen: R indices of candidates.
        similarity: R cosine similarities of the chosen candidates with their query.

    Returns:
        One (H, W, 3) uint8 RGB picture per image; an image without regions shows the view only.
    """
    owner = view.valid.nonzero()[:, 0].numpy()
    sides = (candidates.boxes[:, -1, 2:] - candidates.boxes[:, -1, :2]).numpy()
    area = sides[:, 0] * sides[:, 1]
    pictures = []
    for i, image in enumerate(view_pixels(view)):
        mine = np.flatnonzero(owner == i)
        if not len(mine):
            pictures.append(draw_boxes(image, np.zeros((0, 4))))
            continue
        region = mine[area[mine].argsort()[len(mine) // 2]]
        boxes = candidates.boxes[region].numpy()
        valid = candidates.valid[region].numpy()
        last, best = len(boxes) - 1, chosen[region]
        # Bottom to top: invalid candidates, valid ones, the region, the choice.
        order = [*np.flatnonzero(~valid), *np.flatnonzero(valid[:-1]), last, best]
        colours = [VALID if ok else INVALID for ok in valid[order[:-2]]] + [REGION, CHOSEN]
        labels = [""] * (len(order) - 1) + [f"{similarity[region]:.2f}"]
        pictures.append(draw_boxes(image, boxes[order], labels, colours))
    return pictures
