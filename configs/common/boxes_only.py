"""Mask R-CNN to Faster R-CNN: the same detector and schedule for data without masks."""

from omegaconf import DictConfig


def without_masks(model: DictConfig, dataloader: DictConfig) -> None:
    """Remove the mask head, and do not load masks."""
    for key in ("mask_in_features", "mask_pooler", "mask_head"):
        model.roi_heads.pop(key, None)
    dataloader.train.mapper.use_instance_mask = False
