"""What the tests of several projects' recipes share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyConfig, instantiate
from omegaconf import DictConfig

from region_pretrain.config import CONFIG_ROOT


def load_recipe(project: str, name: str) -> DictConfig:
    """Load ``projects/PROJECT/configs/NAME.py``."""
    return LazyConfig.load(str(_folder(project) / f"{name}.py"))


def recipe_names(project: str) -> set[str]:
    """Names of all recipes of a project, without ``.py``."""
    return {path.stem for path in _folder(project).glob("*.py")}


def check_views_and_schedule(cfg: DictConfig, sizes: list[int], first: float, last: float) -> None:
    """Check the sides of the square views, and the learning-rate multiplier at both ends."""
    views = instantiate(cfg.dataloader.train.dataset.views)
    box = np.array([[50, 40, 300, 400]], np.float32)
    samples = views(640, 480, box, np.random.default_rng(0))
    assert [s.geometry.size for s in samples] == [(size, size) for size in sizes]
    multiplier = instantiate(cfg.lr_multiplier)
    assert multiplier(0.0) == pytest.approx(first)
    assert multiplier(1.0) == pytest.approx(last)


def check_byol_augmentation(first: DictConfig, second: DictConfig) -> None:
    """Check the photometric augmentations of a pair of views (BYOL, appendix B)."""
    for photometry in (first, second):
        assert (photometry.brightness, photometry.contrast) == (0.4, 0.4)
        assert (photometry.saturation, photometry.hue) == (0.2, 0.1)
        assert (photometry.jitter_prob, photometry.gray_prob) == (0.8, 0.2)
        assert tuple(photometry.blur_sigma) == (0.1, 2.0)
    assert (first.blur_prob, second.blur_prob, second.solarize_prob) == (1.0, 0.1, 0.2)
    assert "solarize_prob" not in first


def _folder(project: str) -> Path:
    return CONFIG_ROOT.parent / "projects" / project / "configs"
