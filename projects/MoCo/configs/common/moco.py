"""What all of MoCo's recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.moco import MoCo

optimizer = get_config("common/optim.py").sgd
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

optimizer.lr = 0.03
optimizer.weight_decay = 1e-4
optimizer.params.weight_decay_norm = None  # norms decay as well
train.base_batch_size = 256
lr_multiplier.update(warmup_epochs=0, final_factor=0.0)
train.output_dir = "output/moco"

dataloader.train.total_batch_size = 256
dataloader.train.dataset.regions = None
dataloader.train.dataset.recipe = None
_photometry = dict(
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    jitter_prob=0.8,
    gray_prob=0.2,
    blur_prob=0.5,
    blur_sigma=(0.1, 2.0),
)
dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=L(Photometry)(**_photometry),
    second_photometry=L(Photometry)(**_photometry),
    crop_area=(0.2, 1.0),
)


def moco(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 2048, dim: int = 128
) -> DictConfig:
    """MoCo v2 around the trunk of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of the trunk's last map.
        hidden_dim, dim: of the head.
    """
    return L(MoCo)(
        backbone=L(Trunk)(bottom_up=detector.backbone.bottom_up, feature="res5"),
        head=L(MLPHead)(input_dim=trunk_dim, hidden_dim=hidden_dim, output_dim=dim, norm=""),
        queue=L(KeyQueue)(length=65_536, dim=dim),
        momentum=L(ConstantParamScheduler)(value=0.999),
        temperature=0.2,
        # True: batch norm per GPU, key images shuffled over the GPUs. False: the detector's SyncBN.
        shuffle=True,
        seed="${train.seed}",
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
    )
