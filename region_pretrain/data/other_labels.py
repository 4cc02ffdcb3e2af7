"""Whether labels have the keypoints and segmentation maps that a detector learns."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

from detectron2.data import MetadataCatalog
from detectron2.data.transforms import RandomFlip
from omegaconf import DictConfig, ListConfig, OmegaConf

from region_pretrain.data.evaluators import coco_evaluator_of, evaluators_of
from region_pretrain.errors import UserError
from region_pretrain.overrides import target_of

logger = logging.getLogger(__name__)

_KEYPOINTS = (
    "model.roi_heads.keypoint_head.num_keypoints",
    "model.cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS",
)
_SIGMAS = ("kpt_oks_sigmas", "keypoint_oks_sigmas")  # of COCOEvaluator and build_evaluator
_OF_PERSONS = 17  # pycocotools has sigmas for these


def check_other_labels(records: Sequence[dict[str, Any]], cfg: DictConfig) -> None:
    """Check keypoints and segmentation maps of training data, if the detector learns them.

    Args:
        records: the records that are trained on.
        cfg: the detection config.

    Raises:
        UserError: a box has another number of keypoints than the detector, the data set has no
            names of them, or an image has no segmentation map.
    """
    if OmegaConf.select(cfg, "dataloader.train.mapper.use_keypoint"):
        key, number = _first(cfg, _KEYPOINTS)
        if key:
            _check_keypoints(records, _shown(key), number)
        names = OmegaConf.select(
            cfg, "dataloader.train.mapper.keypoint_hflip_indices.dataset_names"
        )
        for name in [names] if isinstance(names, str) else names or ():
            metadata = MetadataCatalog.get(name)
            if metadata.get("keypoint_names") is None:
                raise UserError(
                    f"{name} has no names of keypoints, by which horizontal flips exchange them: "
                    'list them as "keypoints" in the category of its json, or set keypoint_names '
                    "and keypoint_flip_map in its metadata"
                )
            _warn_of_sides(name, metadata, cfg)
    if _stuff_key(cfg):
        bare = [record for record in records if "sem_seg_file_name" not in record]
        if bare:
            raise UserError(
                f"{len(bare)} of {len(records)} images have no segmentation map "
                f"(sem_seg_file_name), e.g. {bare[0].get('file_name')}, but the detector learns "
                "semantic segmentation: use a data set such as coco_2017_train_panoptic_separated"
            )


def check_evaluated_keypoints(
    name: str, records: Sequence[dict[str, Any]], cfg: DictConfig
) -> None:
    """Check that keypoint AP can be computed, if the detector predicts keypoints.

    Args:
        name: the data set that ``COCOEvaluator`` evaluates.
        records: its records.
        cfg: the detection config.

    Raises:
        UserError: a box, or a crowd region, has another number of keypoints than the detector.
    """
    key, number = _first(cfg, _KEYPOINTS)
    evaluator = coco_evaluator_of(cfg, name, "keypoints")
    learned = OmegaConf.select(cfg, "dataloader.train.mapper.use_keypoint")
    if not (key and learned and evaluator):
        return
    try:
        _check_keypoints(records, _shown(key), number, crowd=True)
    except UserError as error:
        raise UserError(
            f"data set {name!r}, keypoint AP: {error}; to evaluate boxes only, add "
            f"+{evaluator}.tasks=[bbox]"
        ) from None


def check_other_heads(cfg: DictConfig, names: Sequence[str]) -> None:
    """Compare a semantic segmentation head with the data sets, a keypoint head with its evaluator.

    Args:
        cfg: the detection config.
        names: the data sets.

    Raises:
        UserError: the numbers of stuff classes differ, or those of keypoints and OKS sigmas.
    """
    key = _stuff_key(cfg)
    classes = MetadataCatalog.get(names[0]).get("stuff_classes") if key and names else None
    if classes and (number := OmegaConf.select(cfg, key)) != len(classes):
        raise UserError(
            f"{_shown(key)}={number}, but {names[0]} has {len(classes)} stuff_classes: set "
            f"{_shown(key)}={len(classes)}"
        )
    key, number = _first(cfg, _KEYPOINTS)
    learned = OmegaConf.select(cfg, "dataloader.train.mapper.use_keypoint")
    for evaluator in evaluators_of(cfg) if key and learned else ():
        sigmas_key, sigmas = _first(evaluator.lazy, _SIGMAS)
        if sigmas_key and (len(sigmas) or _OF_PERSONS) != number:
            of_yacs = "model.cfg" in key
            shown = "TEST.KEYPOINT_OKS_SIGMAS" if of_yacs else f"{evaluator.key}.{sigmas_key}"
            raise UserError(
                f"the detector predicts {number} keypoints, but {shown} gives OKS sigmas for "
                f"{len(sigmas) or f'the {_OF_PERSONS} of a person'}: list one for each"
            )


def _stuff_key(cfg: DictConfig) -> str | None:
    """Where a detector has its number of stuff classes; None if it learns no segmentation."""
    if OmegaConf.select(cfg, "model.sem_seg_head") is not None:
        return "model.sem_seg_head.num_classes"
    architecture = OmegaConf.select(cfg, "model.cfg.MODEL.META_ARCHITECTURE")
    if architecture in ("PanopticFPN", "SemanticSegmentor"):
        return "model.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES"
    return None


def _shown(key: str) -> str:
    return key.rpartition(".cfg.")[2]  # of a yacs config: as an override


def _first(cfg: DictConfig, keys: Sequence[str]) -> tuple[str, Any]:
    """The first key that a config has, and its value."""
    found = ((key, OmegaConf.select(cfg, key)) for key in keys)
    return next(((key, value) for key, value in found if value is not None), ("", None))


def _check_keypoints(
    records: Sequence[dict[str, Any]], key: str, number: int, crowd: bool = False
) -> None:
    for record in records:
        for annotation in record.get("annotations", ()):
            count = len(annotation.get("keypoints", ())) // 3
            if count != number and (crowd or not annotation.get("iscrowd", 0)):
                raise UserError(
                    f"{record.get('file_name')} has a box with {count} keypoints, but "
                    f"{key}={number}: all boxes need this many (x, y, visibility)"
                )


def _warn_of_sides(name: str, metadata: Any, cfg: DictConfig) -> None:
    """Warn if training images are flipped, but no left keypoint becomes a right one."""
    names = metadata.keypoint_names
    if len(names) < 2 or metadata.get("keypoint_flip_map"):
        return
    augmentations = OmegaConf.select(cfg, "dataloader.train.mapper.augmentations")
    if any(node.get("horizontal", True) for node in _flips(augmentations)):
        logger.warning(
            "%s: a horizontal flip does not exchange any keypoints: %s; if they have sides, write "
            "left_ and right_ in their names, or register the data set with keypoint_names and "
            "keypoint_flip_map in its metadata",
            name,
            ", ".join(names),
        )


def _flips(node: Any) -> Iterator[DictConfig]:
    """The lazy random flips in a node, at any depth."""
    if target_of(node) is RandomFlip:
        yield node
    if isinstance(node, DictConfig | ListConfig):
        for child in node.values() if isinstance(node, DictConfig) else node:
            yield from _flips(child)
