"""What all BYOL recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.modeling.detector import last_map, require
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.byol import BYOL
from region_pretrain.solver import cosine_momentum

optimizer = get_config("common/optim.py").lars
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

train.base_batch_size = 256
lr_multiplier.update(warmup_epochs=10, warmup_factor=0.0, final_factor=0.0)
train.amp.enabled = True
train.channels_last = True

dataloader.train.total_batch_size = 4096
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=_augmentation.first,
    second_photometry=_augmentation.second,
    crop_area=(0.08, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """BYOL for 100 epochs on the trunk of any detector with FPN (``--method byol``).

    Args:
        detector: ``model`` of a detection config.
    """
    require(
        detector,
        "backbone.bottom_up",
        otherwise="BYOL pre-trains the trunk below an FPN; for C4, use --method soco or "
        "point_region",
    )
    train.update(epochs=100, output_dir="output/byol")
    optimizer.lr = 0.45
    optimizer.params.weight_decay = 1e-6
    feature, channels = last_map(detector.backbone.bottom_up)
    model = byol(detector, trunk_dim=channels)
    model.backbone.feature = feature
    return model


def byol(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 4096, dim: int = 256
) -> DictConfig:
    """BYOL on the trunk of an FPN detector.

    The target's initial momentum, like learning rate and weight decay, depends on the length of the
    run: leaves set all three.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of the trunk's last map.
        hidden_dim, dim: hidden and output channels of projector and predictor.
    """
    return L(BYOL)(
        backbone=L(Trunk)(bottom_up=detector.backbone.bottom_up, feature="res5"),
        projector=L(MLPHead)(input_dim=trunk_dim, hidden_dim=hidden_dim, output_dim=dim),
        predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
        momentum=L(cosine_momentum)(start=0.99),
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
    )
