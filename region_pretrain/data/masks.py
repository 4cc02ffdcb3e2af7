"""Whether labels have the masks that a detector is trained on and evaluated with."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf, open_dict

from region_pretrain.data.evaluators import coco_evaluator_of
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)

_MASK_KEYS = ("mask_in_features", "mask_pooler", "mask_head")


@dataclass
class MaskCount:
    """How many boxes have a mask.

    Attributes:
        polygons: boxes with a polygon.
        bitmaps: boxes with an RLE or array mask.
        without: boxes without a mask; an empty ``segmentation`` is none.
        images: images that have boxes without a mask.
        example: file name of the first of these images.
    """

    polygons: int = 0
    bitmaps: int = 0
    without: int = 0
    images: int = 0
    example: str = ""

    @property
    def masks(self) -> int:
        """All boxes with a mask."""
        return self.polygons + self.bitmaps

    @property
    def boxes(self) -> int:
        """All boxes."""
        return self.masks + self.without

    @classmethod
    def of(cls, records: Iterable[dict[str, Any]], crowd: bool = False) -> MaskCount:
        """Count the masks of Detectron2 records.

        Args:
            records: with ``annotations``; others are ignored.
            crowd: count crowd regions, which are evaluated but not trained on.
        """
        count = cls()
        for record in records:
            without = count.without
            for annotation in record.get("annotations", ()):
                if annotation.get("iscrowd", 0) and not crowd:
                    continue
                mask = annotation.get("segmentation")
                if (
                    mask is None
                    or len(mask) == 0
                    or isinstance(mask, list)
                    and not any(map(len, mask))
                ):
                    count.without += 1
                elif isinstance(mask, list):
                    count.polygons += 1
                else:
                    count.bitmaps += 1
            if count.without > without:
                count.images += 1
                count.example = count.example or str(record.get("file_name"))
        return count


def check_masks(records: Iterable[dict[str, Any]], cfg: DictConfig) -> None:
    """Check the masks of training data, and choose the format in which they are loaded.

    RLE masks need ``dataloader.train.mapper.instance_mask_format="bitmask"``, which is set. A
    detector without mask head ignores masks; they are not loaded if only some boxes have one.

    Args:
        records: the records that are trained on.
        cfg: with ``model`` and ``dataloader.train.mapper``; anything else is left alone.

    Raises:
        UserError: the detector has a mask head, but not all boxes have a mask.
    """
    mapper = OmegaConf.select(cfg, "dataloader.train.mapper")
    if not isinstance(mapper, DictConfig) or "model" not in cfg:
        return
    if not mapper.get("use_instance_mask"):
        return
    count = MaskCount.of(records)
    if count.without:
        if head := _mask_head(cfg.model):
            raise UserError(f"{_lack(count)}, but {head} learns masks: {_remedy(cfg)}")
        if not mapper.get("recompute_boxes"):
            _set(mapper, "use_instance_mask", False, f"{_lack(count)}, and the detector needs none")
    elif count.bitmaps and mapper.get("instance_mask_format", "polygon") != "bitmask":
        reason = f"{count.bitmaps} of {count.boxes} masks are RLE"
        _set(mapper, "instance_mask_format", "bitmask", reason)


def check_evaluated_masks(name: str, records: Iterable[dict[str, Any]], cfg: DictConfig) -> None:
    """Check that mask AP can be computed, if the detector predicts masks.

    Args:
        name: the data set that ``COCOEvaluator`` evaluates.
        records: its records.
        cfg: the detection config.

    Raises:
        UserError: not all boxes have a mask.
    """
    key = coco_evaluator_of(cfg, name, "segm")
    if not _mask_head(cfg.model) or key is None:
        return
    count = MaskCount.of(records, crowd=True)
    if count.without:
        raise UserError(
            f"data set {name!r}: {_lack(count)}, so mask AP cannot be computed: {_remedy(cfg)}; to "
            f"evaluate boxes only, add +{key}.tasks=[bbox]"
        )


def _lack(count: MaskCount) -> str:
    images = f"{count.images} images, e.g. {count.example}"
    return f"{count.without} of {count.boxes} boxes have no mask (in {images})"


def _set(mapper: DictConfig, key: str, value: Any, reason: str) -> None:
    with open_dict(mapper):
        mapper[key] = value
    logger.info("dataloader.train.mapper.%s=%s: %s", key, value, reason)


def _mask_head(node: Any, key: str = "model") -> str | None:
    """Key of a mask head that is not null, at any depth of a model's config."""
    if not isinstance(node, DictConfig) or node._is_none():
        return None
    if node.get("mask_head") is not None:
        return f"{key}.mask_head"
    if OmegaConf.select(node, "cfg.MODEL.MASK_ON"):  # a converted yacs config
        return f"{key}.cfg.MODEL.MASK_ON"
    found = (_mask_head(node._get_node(name), f"{key}.{name}") for name in node)
    return next(filter(None, found), None)


def _remedy(cfg: DictConfig) -> str:
    parent, _, last = _mask_head(cfg.model).rpartition(".")
    without = "dataloader.train.mapper.use_instance_mask=False"
    if last == "MASK_ON":
        return f"override {parent}.{last}=False {without}"
    heads = OmegaConf.select(cfg, parent)
    overrides = [f"{parent}.{key}=null" for key in _MASK_KEYS if heads.get(key) is not None]
    overrides.append(without)
    return f"use one of configs/detection/faster_rcnn_*.py, or override {' '.join(overrides)}"
