"""Classifies the regions of a detection config's data from frozen features, without training."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.utils import comm
from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from region_pretrain.config import complete_train
from region_pretrain.engine.build import build_model, build_part, resolve_device
from region_pretrain.engine.labelled_data import (
    check_labelled_data,
    missing_files_are_user_errors,
)
from region_pretrain.engine.output_dir import start_logging
from region_pretrain.engine.processes import on_main_process
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.features import (
    RegionReader,
    Regions,
    model_reader,
    read_regions,
    with_boxes,
)
from region_pretrain.evaluation.knn import knn_classify
from region_pretrain.evaluation.linear import linear_classify
from region_pretrain.evaluation.scenes import SECOND_VIEW, retrieve, variance_within
from region_pretrain.files import make_writable
from region_pretrain.json_files import write_json

logger = logging.getLogger(__name__)

#: File in ``train.output_dir`` with the results.
PROBE_FILE = "probe.json"


def do_probe(cfg: DictConfig, k: int = 20, max_images: int | None = 5000) -> dict[str, Any]:
    """Classify ground-truth boxes by kNN and by a linear classifier; write ``probe.json``.

    Two more measures need no classes: how often a test box is found again in a second view of its
    image, and the fraction of the features' variance within images; see
    :mod:`region_pretrain.evaluation.scenes`.

    Training boxes are those of ``dataloader.train.dataset``, test boxes those of
    ``dataloader.test.dataset``; images are read as by ``dataloader.test.mapper``.

    Args:
        cfg: a detection config, see :func:`region_pretrain.engine.finetune.do_train`;
            ``train.init_checkpoint`` are the weights, without it they are random.
        k: number of neighbours.
        max_images: use only this many images of each split, spread evenly over it; None: all.

    Returns:
        What :data:`PROBE_FILE` contains, on the main process; empty on the others.

    Raises:
        UserError: the config, the data or the checkpoint is invalid, or ``train.output_dir`` cannot
            be written.
    """
    if k < 1 or (max_images is not None and max_images < 1):
        raise UserError(f"k={k} and max_images={max_images} must be at least 1")
    complete_train(cfg)
    start_logging(None)
    cfg.dataloader.pop("evaluator", None)  # a probe needs boxes only, which its checks exceed
    classes = check_labelled_data(cfg, training=True)
    classes.log()
    if cfg.train.seed is None:
        cfg.train.seed = 0
    device = resolve_device(cfg.train.device)
    model = build_model(cfg, device).eval()
    matched = None
    if cfg.train.init_checkpoint:
        partial = cfg.train.init_partial
        matched = load_pretrained(model, cfg.train.init_checkpoint, partial=partial).matched
    else:
        logger.warning("no train.init_checkpoint: probing random weights")
    on_main_process(lambda: make_writable(cfg.train.output_dir, "train.output_dir"))
    reader = model_reader(model)
    splits, seconds = {}, dict.fromkeys(("features", "second_view", "knn", "linear"), 0.0)
    for split in ("train", "test"):
        with missing_files_are_user_errors():
            splits[split] = _read(cfg, split, model, reader, max_images, seconds)
    if not comm.is_main_process():
        return {}
    (train_images, train, _), (test_images, test, second) = splits.values()
    levels = {}
    for level in reader.levels:
        levels[level] = {
            "weights": "random" if matched is None else _loaded(model, reader, level, matched),
            "dimensions": train.features[level].shape[1],
            **_classify(train, test, level, device, k, cfg.train.seed, seconds),
            **_within_images(test, second, level),
        }
    result = {
        "checkpoint": cfg.train.init_checkpoint or None,
        "classes": len(train.labels.unique()),
        "train": {"images": train_images, "boxes": len(train.labels)},
        "test": {"images": test_images, "boxes": len(test.labels)},
        "retrieval_chance": _chance(test),
        "k": k,
        "seed": cfg.train.seed,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "levels": levels,
    }
    path = os.path.join(cfg.train.output_dir, PROBE_FILE)
    write_json(path, result)
    logger.info("%s\n%s", path, table(result))
    return result


def table(result: Mapping[str, Any]) -> str:
    """The results of :func:`do_probe` as text, accuracies in percent."""
    rows = []
    for level, found in result["levels"].items():
        numbers = [
            100 * found[probe][metric]
            for probe in ("knn", "linear")
            for metric in ("top1", "per_class")
        ]
        numbers += [
            math.nan if value is None else 100 * value
            for value in (found["retrieval"], found["variance_within"])
        ]
        rows.append(
            [level, found["weights"], found["dimensions"], *numbers, f"{found['linear']['l2']:g}"]
        )
    train, test = result["train"], result["test"]
    counts = (
        f"{test['boxes']} boxes of {test['images']} images, classified by {train['boxes']} boxes "
        f"of {train['images']} images; accuracy in percent"
    )
    headers = ["level", "weights", "features", f"{result['k']}-NN", "per class"]
    headers += ["linear", "per class", "found again", "within images", "L2"]
    chance = result["retrieval_chance"]
    if chance is not None:
        counts += f"; {100 * chance:.1f} would be found again by chance"
    return f"{counts}\n" + tabulate(rows, headers, floatfmt=".1f", disable_numparse=[9])


def _read(
    cfg: DictConfig,
    split: str,
    model: nn.Module,
    reader: RegionReader,
    max_images: int | None,
    seconds: dict[str, float],
) -> tuple[int, Regions | None, Regions | None]:
    """Number of images of a split, and on the main process their regions and, for the test split,
    those of second views."""
    loader, mapper = cfg.dataloader[split], cfg.dataloader.test.get("mapper")
    if not isinstance(mapper, DictConfig) or "augmentations" not in mapper:
        raise UserError("dataloader.test.mapper has no augmentations, from which a probe resizes")
    key = f"dataloader.{split}.dataset"
    dicts = with_boxes(build_part(loader.dataset, key), key)
    if max_images is not None and len(dicts) > max_images:
        dicts = [dicts[i] for i in np.linspace(0, len(dicts) - 1, max_images).round().astype(int)]
    resizing = [instantiate(a) for a in mapper.augmentations]

    def read(name: str, augmentations: Sequence[Any]) -> Regions | None:
        with _timed(seconds, name):
            return read_regions(
                model,
                reader,
                dicts,
                augmentations,
                input_format=mapper.get("image_format"),
                everywhere=False,
            )

    regions = read("features", resizing)
    second = read("second_view", [*resizing, *SECOND_VIEW]) if split == "test" else None
    if regions is not None:
        logger.info("%s: %d boxes of %d images", split, len(regions.labels), len(dicts))
    return len(dicts), regions, second


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] += time.perf_counter() - start


def _classify(
    train: Regions,
    test: Regions,
    level: str,
    device: torch.device,
    k: int,
    seed: int,
    seconds: dict[str, float],
) -> dict[str, dict[str, float]]:
    x, y, test_x = (
        t.to(device) for t in (train.features[level], train.labels, test.features[level])
    )
    if not (x.isfinite().all() and test_x.isfinite().all()):
        raise UserError(f"the features of level {level} are not finite: the weights have diverged")
    with _timed(seconds, "knn"):
        by_neighbours = accuracy_of(knn_classify(x, y, test_x, k=k).cpu(), test.labels)
    with _timed(seconds, "linear"):
        predicted, penalty = linear_classify(x, y, test_x, seed=seed)
    linear = accuracy_of(predicted.cpu(), test.labels)
    return {"knn": by_neighbours._asdict(), "linear": {**linear._asdict(), "l2": penalty}}


def _chance(test: Regions) -> float | None:
    features = next(iter(test.features.values()))
    found = retrieve(features, features, test.images)
    return found and found.chance


def _within_images(test: Regions, second: Regions, level: str) -> dict[str, float | None]:
    found = retrieve(test.features[level], second.features[level], test.images)
    return {
        "retrieval": found and found.top1,
        "variance_within": variance_within(test.features[level], test.images),
    }


def _loaded(model: nn.Module, reader: RegionReader, level: str, matched: Sequence[str]) -> str:
    """How much of a level's own parameters the checkpoint filled."""
    mine = reader.parameters_of(level)
    names = {name for name, p in model.named_parameters(remove_duplicate=False) if p in mine}
    count = len(names & set(matched))
    return "loaded" if count == len(names) else "partly random" if count else "random"
