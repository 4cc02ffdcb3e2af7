"""Pictures for notebooks, which display the PIL image that a cell returns."""

from __future__ import annotations

import os
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from torch import nn

from region_pretrain.api.data import Data, DataSets, records_of
from region_pretrain.api.pretraining import Composed, check_before_search, compose, find_regions
from region_pretrain.api.results import Finetuned, Pretrained
from region_pretrain.api.session import isolated
from region_pretrain.data.sources import register_named
from region_pretrain.errors import UserError
from region_pretrain.modeling.given import modes_kept, weights_kept
from region_pretrain.reporting import pictures


def show_views(
    run: Pretrained | str | os.PathLike | DictConfig,
    count: int = 4,
    *,
    own: bool = False,
    height: int = 224,
    **settings: Any,
) -> Image.Image:
    """Draw what a pre-training sees: one row per image, one column per view.

    Boxes of one colour are the same region in several views; grey ones are in one view only.

    Args:
        run: a finished pre-training; or, before one, the first argument of
            :func:`~region_pretrain.api.pretraining.pretrain`.
        count: number of images, the first ones of the run.
        own: draw the method's own picture instead, e.g. its candidate boxes or affinity maps, with
            the weights of the run or, before it, the initial ones.
        height: height of a view in pixels.
        **settings: further arguments of that function: ``images``, ``detector``, ``regions``, ...

    Raises:
        UserError: an argument is invalid, or the method draws no pictures of its own.
    """
    if isinstance(run, Pretrained):
        if settings:
            raise UserError(f"{next(iter(settings))}= is an argument of the run that is drawn")
        composed = Composed(run.config, run.given, run.detector)
    else:
        composed = compose(run, **settings)
    if count < 1 or height < 16:
        raise UserError(f"count={count}, height={height}: must be at least 1 and 16")
    weights = run.checkpoint if isinstance(run, Pretrained) else ""
    with ExitStack() as stack:
        stack.enter_context(isolated(composed.given))
        if isinstance(composed.detector, nn.Module):  # the method's model consists of its modules
            stack.enter_context(modes_kept(composed.detector))
            stack.enter_context(weights_kept(composed.detector))
        register_named(composed.cfg)
        check_before_search(composed.cfg, composed.detector, count)
        find_regions(composed.cfg)
        batch = pictures.first_views(composed.cfg, count)
        if own:
            built = composed.detector if isinstance(composed.detector, nn.Module) else None
            drawn = pictures.model_pictures(composed.cfg, batch, weights, built)
        else:
            drawn = pictures.pictures(composed.cfg, batch)
    return Image.fromarray(pictures.sheet(drawn, height))


def show_detections(
    run: Finetuned,
    images: Data = None,
    count: int = 4,
    *,
    min_score: float = 0.5,
    height: int = 288,
) -> Image.Image:
    """Draw what a detector finds, one row per image.

    Args:
        run: the result of :func:`~region_pretrain.api.finetuning.finetune`.
        images: images, see :data:`~region_pretrain.api.data.Data`; None: those of ``val``, beside
            which the ground truth is drawn (left).
        count: number of images, the first ones.
        min_score: detections with a lower score are not drawn.
        height: height of an image in pixels.

    Raises:
        UserError: an argument is invalid.
    """
    if not isinstance(run, Finetuned):
        raise UserError(f"run={run!r}: must be what finetune returned, not its folder")
    if count < 1 or height < 16:
        raise UserError(f"count={count}, height={height}: must be at least 1 and 16")
    data, cfg = DataSets(), run.config
    names = None if images is None else data.name("images", images)
    with isolated({**run.given, **data.given}):
        register_named(cfg)
        if names is None:
            records = pictures.first_records(cfg, count)
            truth = pictures.ground_truth_pictures(cfg, records)
        else:
            records, truth = records_of(names)[:count], []
        with modes_kept(run.model):
            found = pictures.detection_pictures(
                cfg, run.model.eval(), records, run.classes, min_score
            )
    columns = [truth, found] if truth else [found]
    return Image.fromarray(pictures.sheet(list(zip(*columns, strict=True)), height))
