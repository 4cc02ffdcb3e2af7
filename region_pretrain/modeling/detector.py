"""What a pre-training method needs to know about a detector's config."""

from __future__ import annotations

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig, OmegaConf

from region_pretrain.errors import UserError


def has(detector: DictConfig, *keys: str) -> bool:
    """Whether a detector's config has all of these dotted keys, and none of them is null."""
    return all(OmegaConf.select(detector, key) is not None for key in keys)


def require(detector: DictConfig, *keys: str, otherwise: str) -> None:
    """Check that a detector has the modules that a method trains.

    Args:
        detector: ``model`` of a detection config.
        keys: dotted keys, e.g. ``roi_heads.box_head``.
        otherwise: what the method needs, and what to use instead.

    Raises:
        UserError: one of them is missing.
    """
    missing = [key for key in keys if not has(detector, key)]
    if missing:
        raise UserError(f"the detector has no {missing[0]}: {otherwise}")


def last_map(trunk: DictConfig) -> tuple[str, int]:
    """Name and channels of a trunk's last map, e.g. ``("res5", 2048)``.

    Args:
        trunk: lazy Detectron2 backbone; it is built on the meta device.
    """
    with torch.device("meta"):
        maps = instantiate(trunk).output_shape()
    name, shape = list(maps.items())[-1]
    return name, shape.channels
