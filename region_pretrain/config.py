"""Where the shipped configs are, and how to get one."""

from __future__ import annotations

from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from region_pretrain.errors import UserError

_PACKAGE = Path(__file__).resolve().parent

#: The ``configs/`` folder: of the checkout, or the copy that an installed wheel carries.
CONFIG_ROOT = next(
    (p for p in (_PACKAGE.parent / "configs", _PACKAGE / "configs") if (p / "detection").is_dir()),
    _PACKAGE.parent / "configs",
)


def get_config(name: str) -> DictConfig:
    """Load a shipped config, as ``detectron2.model_zoo.get_config`` does for Detectron2's own.

    Args:
        name: path relative to ``configs/``, e.g. ``"detection/mask_rcnn_r50_fpn_4conv1fc.py"``.

    Returns:
        A fresh config that the caller may change.

    Raises:
        UserError: there is no such config; the message lists those that are in its folder.
    """
    path = CONFIG_ROOT / name
    if not path.is_file():
        near = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise UserError(f"no config {name!r} in {CONFIG_ROOT}; its folder has {near}")
    return LazyConfig.load(str(path))
