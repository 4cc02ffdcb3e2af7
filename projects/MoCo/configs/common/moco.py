"""What all MoCo recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.modeling.detector import last_map, require
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.moco import MoCo

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=_shared.photometry,
    second_photometry=_shared.photometry,
    crop_area=(0.2, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """MoCo v2 for 200 epochs on the trunk of any detector with FPN (``--method moco``).

    Args:
        detector: ``model`` of a detection config.
    """
    require(
        detector,
        "backbone.bottom_up",
        otherwise="MoCo pre-trains the trunk below an FPN; for C4, use --method soco or "
        "point_region",
    )
    train.update(epochs=200, output_dir="output/moco")
    feature, channels = last_map(detector.backbone.bottom_up)
    model = moco(detector, trunk_dim=channels)
    model.backbone.feature = feature
    return model


def moco(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 2048, dim: int = 128
) -> DictConfig:
    """MoCo v2 on the trunk of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of the trunk's last map.
        hidden_dim, dim: hidden and output channels of the head.
    """
    return L(MoCo)(
        backbone=L(Trunk)(bottom_up=detector.backbone.bottom_up, feature="res5"),
        head=L(MLPHead)(input_dim=trunk_dim, hidden_dim=hidden_dim, output_dim=dim, norm=""),
        queue=L(KeyQueue)(length=65_536, dim=dim),
        momentum=L(ConstantParamScheduler)(value=0.999),
        temperature=0.2,
        # True: shuffling BN, i.e. per-GPU batch norm. False: the detector's SyncBN.
        shuffle=True,
        seed="${train.seed}",
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
    )
