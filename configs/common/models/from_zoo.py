"""Detectron2's detectors for fine-tuning self-supervised weights.

MoCo, section 4.2: all layers are trained; batch norm is trained and synchronised instead of frozen,
and also used in the new FPN layers. Input is RGB in 0-255; the 3x3 convolutions carry the stride,
as in torchvision.
"""

from detectron2 import model_zoo
from omegaconf import DictConfig


def from_zoo(name: str) -> DictConfig:
    """``model`` of Detectron2's ``common/models/<name>.py``, with the changes above."""
    model = model_zoo.get_config(f"common/models/{name}.py").model
    trunk = model.backbone
    if "bottom_up" in trunk:
        trunk.norm = "SyncBN"  # of the FPN
        trunk = trunk.bottom_up
    trunk.freeze_at = 0
    trunk.stem.norm = "SyncBN"
    trunk.stages.norm = "SyncBN"
    trunk.stages.stride_in_1x1 = False
    constants = model_zoo.get_config("common/data/constants.py").constants
    model.pixel_mean = constants.imagenet_rgb256_mean
    model.pixel_std = constants.imagenet_rgb256_std
    if "input_format" in model:  # FCOS has none
        model.input_format = "RGB"
    return model
