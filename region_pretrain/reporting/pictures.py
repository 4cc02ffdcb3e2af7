"""Pictures of what a pre-training sees, and of what a detector finds."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode
from omegaconf import DictConfig
from torch import nn

from region_pretrain.config import check_pretraining
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import apply_photometry
from region_pretrain.engine.build import build_part
from region_pretrain.engine.checkpoint_file import read_run_checkpoint
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.images import SamePixels, read_record
from region_pretrain.modeling.given import weights_kept
from region_pretrain.modeling.meta_arch import check_contract, renew_momentum_copies
from region_pretrain.reporting.boxes import draw_detections, draw_regions

_GAP = 8  # pixels between the pictures of a sheet


class NothingToDraw(UserError):
    """A method draws no pictures beyond its views."""


def first_views(cfg: DictConfig, count: int) -> ViewBatch:
    """The first images of a pre-training's first batch, exactly as the run sees them.

    Args:
        cfg: a pre-training config; ``dataloader.train`` and ``train.seed`` are read.
        count: number of images.

    Raises:
        UserError: the data cannot be loaded, or has fewer images.
    """
    check_pretraining(cfg)
    loader = cfg.dataloader.train.copy()
    if "seed" in loader and loader.seed is None:
        loader.seed = cfg.train.seed or 0
    # Samples do not depend on the batch size, so a small batch starts like the run's own.
    loader.total_batch_size = count
    loader.num_workers = 0
    return next(iter(build_part(loader, "dataloader.train").iterate(0, 1)))


def pictures(cfg: DictConfig, batch: ViewBatch) -> list[list[np.ndarray]]:
    """Draw what the network sees of a batch.

    Args:
        cfg: the pre-training config. The ``pictures`` method of its view sampler draws, otherwise
            :func:`view_pictures`.
        batch: a batch from its loader.

    Returns:
        Rows of (H, W, 3) uint8 RGB pictures.
    """
    own = instantiate(cfg.dataloader.train.dataset.views).pictures(batch)
    return view_pictures(batch) if own is None else own


def view_pixels(view: View) -> np.ndarray:
    """``(B, H, W, 3)`` uint8 RGB: a view after photometric augmentation, before normalisation."""
    images = apply_photometry(view.images.float() / 255, view.photometry)
    images = (images * 255).round().clamp(0, 255).to(torch.uint8)
    return images.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def model_pictures(
    cfg: DictConfig, batch: ViewBatch, weights: str = "", detector: nn.Module | None = None
) -> list[list[np.ndarray]]:
    """Draw a method's own pictures: ``pictures(batch)`` of its meta-architecture, in eval mode.

    Args:
        cfg: a pre-training config; ``model`` and ``train.seed`` are read.
        batch: a batch from its loader.
        weights: a checkpoint of a run of this config; empty: the initial weights of a run.
        detector: the built detector of whose modules ``model`` consists; None: there is none.

    Returns:
        Rows of (H, W, 3) uint8 RGB pictures.

    Raises:
        NothingToDraw: the method draws no pictures.
        UserError: the checkpoint is damaged or belongs to another model.
    """
    if cfg.train.seed is None:
        cfg.train.seed = 0
    torch.manual_seed(cfg.train.seed)
    with nullcontext() if detector is None else weights_kept(detector):
        model = check_contract(instantiate(cfg.model))
    model.to(next(model.parameters()).device)  # that of a built detector
    if not weights:
        if path := cfg.train.init_checkpoint:
            load_pretrained(model, path, partial=cfg.train.init_partial)
        renew_momentum_copies(model)
    else:
        saved = read_run_checkpoint(weights)
        try:
            model.load_state_dict({**saved["model"], **saved["pretraining"]})
        except (RuntimeError, TypeError) as error:
            why = str(error).strip().splitlines()[0]
            raise UserError(f"{weights} belongs to a run of another config: {why}") from error
    drawn = model.eval().pictures(batch.to(next(model.parameters()).device))
    if drawn is None:
        raise NothingToDraw(
            f"{type(model).__name__} draws no pictures of its own: leave out --method"
        )
    return drawn


def view_pictures(batch: ViewBatch) -> list[list[np.ndarray]]:
    """Draw every view of every image of a batch.

    Args:
        batch: a batch with any number of views.

    Returns:
        For each image a row with one (H, W, 3) uint8 RGB picture per view: its pixels after
        photometric augmentation, before normalisation, enlarged by a whole number. A region has the
        same colour in all views.
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


def first_records(cfg: DictConfig, count: int) -> list[dict[str, Any]]:
    """The first test images of a detection config."""
    return list(instantiate(cfg.dataloader.test.dataset)[:count])


def ground_truth_pictures(cfg: DictConfig, records: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Draw the ground-truth boxes of test images.

    Args:
        cfg: a detection config; ``dataloader.test`` is read.
        records: some of its test images.

    Returns:
        One (H, W, 3) uint8 RGB picture per image.
    """
    drawn = []
    for record in records:
        truth = [a for a in record.get("annotations", []) if not a.get("iscrowd", 0)]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
        classes = [a["category_id"] for a in truth]
        drawn.append(
            draw_detections(read_record(record), np.array(boxes), classes, class_names(cfg))
        )
    return drawn


@torch.no_grad()
def detection_pictures(
    cfg: DictConfig,
    detector: nn.Module,
    records: Sequence[dict[str, Any]],
    names: Sequence[str] | None = None,
    min_score: float = 0.5,
) -> list[np.ndarray]:
    """Draw what a detector finds in test images.

    Args:
        cfg: a detection config; ``dataloader.test`` is read.
        detector: in eval mode.
        records: the images.
        names: the classes; None: those of the config's test data.
        min_score: detections with a lower score are not drawn.

    Returns:
        One (H, W, 3) uint8 RGB picture per image.
    """
    names = class_names(cfg) if names is None else names
    mapper = SamePixels(instantiate(cfg.dataloader.test.mapper))
    drawn = []
    for record in records:
        found = detector([mapper(record)])[0]["instances"].to("cpu")
        boxes, classes = found.pred_boxes.tensor.numpy(), found.pred_classes.tolist()
        scores = found.scores.tolist()
        drawn.append(draw_detections(read_record(record), boxes, classes, names, scores, min_score))
    return drawn


def class_names(cfg: DictConfig) -> Sequence[str]:
    """The classes of a detection config's test data."""
    names = instantiate(cfg.dataloader.test.dataset.names)
    return MetadataCatalog.get(names if isinstance(names, str) else names[0]).thing_classes


def sheet(rows: Sequence[Sequence[np.ndarray]], height: int = 224) -> np.ndarray:
    """Arrange pictures on a white sheet.

    Args:
        rows: rows of (H, W, 3) uint8 RGB pictures, all of the same length.
        height: height of every picture on the sheet in pixels; its width follows.

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
