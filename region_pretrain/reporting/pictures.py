"""What a pre-training sees: its views after photometry, with the regions that are matched."""

from __future__ import annotations

import pickle
from collections.abc import Sequence

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import apply_photometry
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import check_contract
from region_pretrain.reporting.plots import draw_regions

_GAP = 8  # pixels between pictures of a sheet


def first_views(cfg: DictConfig, count: int) -> ViewBatch:
    """The first images of a pre-training's first batch, exactly as the run would see them.

    Args:
        cfg: a pre-training config; ``dataloader.train`` and ``train.seed`` are read.
        count: images.

    Raises:
        UserError: the data does not fit, or has fewer images.
    """
    loader = cfg.dataloader.train.copy()
    if "views" not in loader.get("dataset", {}):
        raise UserError("the config has no dataloader.train.dataset.views: it is no pre-training")
    if "seed" in loader and loader.seed is None:
        loader.seed = cfg.train.seed or 0
    # A smaller batch is the beginning of the larger one: samples do not depend on its size.
    loader.total_batch_size = count
    loader.num_workers = 0
    return next(iter(instantiate(loader).iterate(0, 1)))


def pictures(cfg: DictConfig, batch: ViewBatch) -> list[list[np.ndarray]]:
    """Draw what the network sees of a batch.

    Args:
        cfg: the pre-training config. Its view sampler's ``pictures`` draws, else
            :func:`view_pictures` does.
        batch: of its loader.

    Returns:
        Rows of (H, W, 3) uint8 RGB pictures.
    """
    own = instantiate(cfg.dataloader.train.dataset.views).pictures(batch)
    return view_pictures(batch) if own is None else own


def view_pixels(view: View) -> np.ndarray:
    """``(B, H, W, 3)`` uint8 RGB: a view's pixels after photometry, before normalisation."""
    images = apply_photometry(view.images.float() / 255, view.photometry)
    images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def model_pictures(cfg: DictConfig, batch: ViewBatch, weights: str = "") -> list[list[np.ndarray]]:
    """What a method draws of its own: its meta-architecture's ``pictures(batch)``, in eval mode.

    Args:
        cfg: a pre-training config; ``model`` and ``train.seed`` are read.
        batch: from a loader.
        weights: a checkpoint of a run of this config; ``""`` for what a run starts with.

    Returns:
        The method's pictures, as :func:`view_pictures` returns them.

    Raises:
        UserError: the method draws nothing, or the checkpoint is not of this model.
    """
    if cfg.train.seed is None:
        cfg.train.seed = 0
    torch.manual_seed(cfg.train.seed)
    model = check_contract(instantiate(cfg.model))
    if weights:
        try:
            saved = torch.load(
                PathManager.get_local_path(weights), map_location="cpu", weights_only=True
            )
            model.load_state_dict({**saved["model"], **saved["pretraining"]})
        except (OSError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"{weights} is no checkpoint of a run of this config: {why}") from error
    drawn = model.eval().pictures(batch)
    if drawn is None:
        raise UserError(f"{type(model).__name__} draws no pictures of its own: leave out --method")
    return drawn


def view_pictures(batch: ViewBatch) -> list[list[np.ndarray]]:
    """Draw every view of every image of a batch.

    Args:
        batch: from a loader, with any number of views.

    Returns:
        For each image, for each view, (H, W, 3) uint8 RGB: the pixels after photometry, before
        normalisation, enlarged by a whole number; a region has the same colour in all views.
    """
    pixels = [view_pixels(view) for view in batch.views]
    rows = []
    for i in range(len(batch)):
        drawn = []
        for view, images in zip(batch.views, pixels, strict=True):
            ids = torch.where(view.valid[i], view.region_ids[i], -1)
            drawn.append((images[i], view.boxes[i].cpu().numpy(), ids.tolist()))
        rows.append(draw_regions(drawn))
    return rows


def sheet(rows: Sequence[Sequence[np.ndarray]], height: int = 224) -> np.ndarray:
    """Put pictures into one: a line an image, a column a view, on white.

    Args:
        rows: (H, W, 3) uint8 RGB pictures, as many in each row.
        height: of each in pixels; widths follow.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    small = [[_resize(picture, height) for picture in row] for row in rows]
    widths = [max(row[c].shape[1] for row in small) for c in range(len(small[0]))]
    width = sum(widths) + _GAP * (len(widths) + 1)
    canvas = np.full((len(small) * (height + _GAP) + _GAP, width, 3), 255, np.uint8)
    for r, row in enumerate(small):
        top, left = _GAP + r * (height + _GAP), _GAP
        for picture, column in zip(row, widths, strict=True):
            canvas[top : top + height, left : left + picture.shape[1]] = picture
            left += column + _GAP
    return canvas


def _resize(picture: np.ndarray, height: int) -> np.ndarray:
    width = max(1, round(picture.shape[1] * height / picture.shape[0]))
    shrinks = height < picture.shape[0]
    how = cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST
    return cv2.resize(picture, (width, height), interpolation=how)
