"""Draws images with their regions, to inspect them before a long run."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.files import write_atomic
from region_pretrain.images import read_record
from region_pretrain.regions.store import RegionStore

_COLUMNS = 4


def draw_preview(records: Sequence[dict], store: RegionStore, out: str, count: int = 8) -> str:
    """Write :func:`preview_figure` to a PNG.

    Args:
        records, store, count: see there.
        out: path of the PNG.

    Returns:
        ``out``.
    """
    figure = preview_figure(records, store, count)
    write_atomic(out, FigureCanvasAgg(figure).print_png)
    return out


def preview_image(
    records: Sequence[dict], store: RegionStore, count: int = 8, max_boxes: int = 25
) -> Image.Image:
    """:func:`preview_figure` as a picture, which notebooks display."""
    canvas = FigureCanvasAgg(preview_figure(records, store, count, max_boxes))
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")


def preview_figure(
    records: Sequence[dict], store: RegionStore, count: int = 8, max_boxes: int = 25
) -> Figure:
    """Draw some images of a store with their regions.

    Args:
        records: the images; those that are not in the store are skipped.
        store: their regions.
        count: number of images, spread evenly over the records.
        max_boxes: largest number of regions drawn per image, a random choice.

    Raises:
        UserError: ``count`` is below 1, or no image is in the store.
    """
    if count < 1:
        raise UserError(f"a preview needs at least one image, not {count}")
    stored = np.flatnonzero(store.rows([str(r["image_id"]) for r in records]) >= 0)
    if not len(stored):
        raise UserError(f"{store.path} has regions for none of these images")
    count = min(count, len(stored))
    chosen = stored[np.linspace(0, len(stored) - 1, count).round().astype(int)]
    rng = np.random.default_rng(0)
    columns = min(_COLUMNS, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
    colours = matplotlib.colormaps["turbo"]
    for axis in axes:
        axis.set_axis_off()
    for axis, i in zip(axes, chosen, strict=False):
        key = str(records[i]["image_id"])
        boxes = store.boxes(key)
        drawn = boxes[np.sort(rng.permutation(len(boxes))[:max_boxes])]
        axis.imshow(read_record(records[i]))
        for j, (x0, y0, x1, y1) in enumerate(drawn.tolist()):
            # In a plot, pixel centres have integer coordinates.
            axis.add_patch(
                Rectangle(
                    (x0 - 0.5, y0 - 0.5),
                    x1 - x0,
                    y1 - y0,
                    fill=False,
                    linewidth=1.2,
                    edgecolor=colours((j + 0.5) / len(drawn)),
                )
            )
        name = key if len(key) <= 36 else f"...{key[-33:]}"
        name = name.replace("$", r"\$")  # matplotlib would read mathematics
        axis.set_title(f"{name}\n{len(drawn)} of {len(boxes)} regions", fontsize=8)
    return figure
