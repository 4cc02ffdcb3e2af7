"""What all of BYOL's recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.two_crops import TwoCrops
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.byol import BYOL
from region_pretrain.solver import cosine_momentum

optimizer = get_config("common/optim.py").lars
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

optimizer.lr = 0.2  # 0.2 * 4096 / 256 = 3.2
optimizer.params.weight_decay = 1.5e-6
train.base_batch_size = 256
lr_multiplier.update(warmup_epochs=10, warmup_factor=0.0, final_factor=0.0)
train.amp.enabled = True
train.channels_last = True
train.output_dir = "output/byol"

dataloader.train.total_batch_size = 4096
dataloader.train.dataset.regions = None
dataloader.train.dataset.recipe = None
_jitter = dict(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2
)
dataloader.train.dataset.views = L(TwoCrops)(
    size=224,
    first_photometry=L(Photometry)(**_jitter, blur_prob=1.0, blur_sigma=(0.1, 2.0)),
    second_photometry=L(Photometry)(
        **_jitter, blur_prob=0.1, blur_sigma=(0.1, 2.0), solarize_prob=0.2
    ),
    crop_area=(0.08, 1.0),
)


def byol(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 4096, dim: int = 256
) -> DictConfig:
    """BYOL around the trunk of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of the trunk's last map.
        hidden_dim, dim: of projector and predictor.
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
