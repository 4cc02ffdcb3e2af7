"""The pictures of a sweep's report: views of each pre-training, detections of each fine-tuning.

They are drawn once and kept as PNG in ``<sweep>/pictures/``.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from detectron2.config import instantiate
from omegaconf import DictConfig

from region_pretrain.config import load_config
from region_pretrain.data.sources import register_named
from region_pretrain.engine.checkpoint import FINAL as FINAL_CHECKPOINT
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.files import write_atomic
from region_pretrain.reporting import html, pictures
from region_pretrain.reporting.boxes import to_png
from region_pretrain.sweeps import state
from region_pretrain.sweeps.definition import FINAL
from region_pretrain.sweeps.graph import FINETUNE, Run
from region_pretrain.sweeps.results import pretrainings
from region_pretrain.sweeps.state import SweepFile

logger = logging.getLogger(__name__)

FOLDER = "pictures"
_HEIGHT = 288  # pixels of one picture

_VIEWS = (
    "The views of the first images of each pre-training, one row per image, after photometric "
    "augmentation. Boxes of one colour and number are the same region in several views; grey boxes "
    "are in one view only. The README of a method that draws other pictures explains them."
)
_DETECTIONS = (
    "The first images of the test split: ground truth, then for each initialisation the detections "
    "with a score of at least 50 %, after fine-tuning with the first seed."
)

Draw = Callable[[DictConfig, int], Sequence[Sequence[np.ndarray]]]


class SweepPictures:
    """Draws the pictures that a sweep's runs allow so far.

    A picture that cannot be drawn, e.g. because a checkpoint was deleted, becomes a line of text.

    Args:
        sweep: the sweep.
        folder: its folder.
    """

    def __init__(self, sweep: SweepFile, folder: str) -> None:
        self._sweep = sweep
        self._folder = os.path.join(folder, FOLDER)

    def views(self) -> list[html.Markup]:
        """What each pre-training's first seed sees, and the method's own pictures."""
        if not self._sweep.pictures:
            return []
        blocks = []
        for init, by_seed in pretrainings(self._sweep).items():
            run, label = next(iter(by_seed.values())), self._sweep.labels[init]
            blocks += self._figure(run, "views", f"Views of {label}", _views)
            if state.is_finished(run):
                draw = functools.partial(_model_pictures, weights=run.product)
                blocks += self._figure(run, "method", f"Pictures drawn by {label}", draw)
        return [html.text(_VIEWS), html.side_by_side(blocks)] if blocks else []

    def detections(self) -> list[html.Markup]:
        """One row per fine-tuning: all labels, final checkpoints, the first seed."""
        if not self._sweep.pictures:
            return []
        rows, finetunings = [], _finetunings(self._sweep)
        for name, entries in finetunings.items():
            blocks: list[html.Markup] = []
            for entry in entries:
                run, label = self._sweep.plan.runs[entry["run"]], self._sweep.labels[entry["init"]]
                if not state.is_finished(run):
                    continue
                if not blocks:
                    blocks += self._figure(run, "truth", "ground truth", _ground_truth)
                weights = os.path.join(run.folder, f"{FINAL_CHECKPOINT}.pth")
                draw = functools.partial(_detections, weights=weights)
                blocks += self._figure(run, "detections", label, draw)
            title = [html.text(f"{name}:")] if len(finetunings) > 1 else []
            rows += [*title, html.side_by_side(blocks)] if blocks else []
        return [html.text(_DETECTIONS), *rows] if rows else []

    def _figure(self, run: Run, kind: str, caption: str, draw: Draw) -> list[html.Markup]:
        """A picture of a run as a figure or a line of text; nothing if there is nothing to draw."""
        count = self._sweep.pictures
        path = os.path.join(self._folder, f"{os.path.basename(run.folder)}-{kind}{count}.png")
        config = os.path.join(run.folder, "config.yaml")
        finished = state.is_finished(run)
        drawn = os.path.exists(path)
        if not drawn or finished and state.finished_at(run) > os.path.getmtime(path):
            if not os.path.exists(config) and not finished:
                return []  # it has not started
            try:
                cfg = load_config(config)
                register_named(cfg)
                png = _png(draw(cfg, count))
            except pictures.NothingToDraw:
                png = b""
            except Exception as error:  # raised by any data set, sampler or model
                logger.info("%s of %s", kind, run.name, exc_info=True)
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                return [html.text(f"No picture for “{caption}” ({run.name}): {reason}")]
            os.makedirs(self._folder, exist_ok=True)
            write_atomic(path, lambda file: file.write(png))
        with open(path, "rb") as file:
            png = file.read()
        return [html.figure(png, caption)] if png else []


def _finetunings(sweep: SweepFile) -> dict[str, list[Mapping[str, Any]]]:
    """Fine-tuning -> one entry per initialisation, in the order of the labels."""
    entries = [e for e in sweep.plan.entries if e["kind"] == FINETUNE and e["checkpoint"] == FINAL]
    found: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in sorted(entries, key=lambda e: -e["label_fraction"]):  # stable: first seed first
        found.setdefault(entry["finetune"], {}).setdefault(entry["init"], entry)
    return {name: [e[i] for i in sweep.labels if i in e] for name, e in found.items()}


def _png(rows: Sequence[Sequence[np.ndarray]]) -> bytes:
    return to_png(pictures.sheet(rows, _HEIGHT), max_width=1200)


def _views(cfg: DictConfig, count: int) -> list[list[np.ndarray]]:
    return pictures.pictures(cfg, pictures.first_views(cfg, count))


def _model_pictures(cfg: DictConfig, count: int, weights: str) -> list[list[np.ndarray]]:
    return pictures.model_pictures(cfg, pictures.first_views(cfg, count), weights)


def _ground_truth(cfg: DictConfig, count: int) -> list[list[np.ndarray]]:
    records = pictures.first_records(cfg, count)
    return [[picture] for picture in pictures.ground_truth_pictures(cfg, records)]


def _detections(cfg: DictConfig, count: int, weights: str) -> list[list[np.ndarray]]:
    detector = instantiate(cfg.model).cpu().eval()
    load_pretrained(detector, weights)
    records = pictures.first_records(cfg, count)
    return [[picture] for picture in pictures.detection_pictures(cfg, detector, records)]
