"""What the functions of the Python API return."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig
from PIL import Image
from torch import nn

from region_pretrain.api.detectors import AnyDetector
from region_pretrain.api.session import Given
from region_pretrain.engine.checkpoint import FINAL
from region_pretrain.errors import UserError
from region_pretrain.metrics import Results, read_metrics
from region_pretrain.reporting.plots import metric_curve, plot_curves


@dataclass(repr=False)
class Run:
    """A finished run.

    Attributes:
        model: what was trained, on its device.
        metrics: the newest value of every metric.
        output_dir: the run's folder.
        config: the config of the run, as in its ``config.yaml``.
        detector: the detector, as it was passed, or as its config.
        given: the data sets that were passed as records.
    """

    model: nn.Module
    metrics: dict[str, float]
    output_dir: str
    config: DictConfig
    detector: AnyDetector = None
    given: Given = field(default_factory=dict)

    @property
    def checkpoint(self) -> str:
        """Path of the run's ``model_final.pth``."""
        return os.path.join(self.output_dir, f"{FINAL}.pth")

    def history(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.json``: one dict per logged iteration."""
        return read_metrics(self.output_dir)

    def plot(self, *keys: str) -> Image.Image:
        """Draw metrics by iteration.

        Args:
            *keys: names of metrics; by default ``total_loss``.

        Raises:
            UserError: the run has not logged one of them.
        """
        keys = keys or ("total_loss",)
        rows = self.history()
        known = list(dict.fromkeys(key for row in rows for key in row))
        if unknown := [key for key in keys if key not in known]:
            raise UserError(f"the run has not logged {unknown[0]}, only {', '.join(known)}")
        curves = {key: metric_curve(rows, key) for key in keys}
        png = plot_curves(curves, "iteration", keys[0] if len(keys) == 1 else "")
        return Image.open(io.BytesIO(png)).convert("RGB")


@dataclass(repr=False)
class Pretrained(Run):
    """A pre-training: ``model`` is the method's meta-architecture, which contains the detector's
    modules. The checkpoint contains them under the detector's own names.
    """

    def __repr__(self) -> str:
        loss = f", total_loss={self.metrics['total_loss']:.4g}" if self.metrics else ""
        return f"Pretrained({type(self.model).__name__}, {self.checkpoint!r}{loss})"


@dataclass(repr=False)
class Finetuned(Run):
    """A fine-tuning: ``model`` is the detector.

    Attributes:
        results: task -> metric -> percent, at the end of the training.
        classes: the names of the classes, in the order of the predictions.
    """

    results: Results = field(default_factory=dict)
    classes: Sequence[str] = ()

    def __repr__(self) -> str:
        found = [f", {task} AP={v['AP']:.1f}" for task, v in self.results.items() if v.get("AP")]
        return f"Finetuned({type(self.model).__name__}, {self.checkpoint!r}{''.join(found)})"
