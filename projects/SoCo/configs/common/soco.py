"""What all SoCo recipes share. Leaves choose detector, views, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.modeling.detector import has, require
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.soco import SoCo, SoCoViews
from region_pretrain.solver import cosine_momentum

optimizer = get_config("common/optim.py").lars
lr_multiplier = get_config("common/schedule.py").pretrain
train = get_config("common/train.py").train
dataloader = get_config("common/data/unlabeled.py").dataloader

train.base_batch_size = 256  # lr 1.0 * 2048 / 256 = 8.0
train.amp.enabled = True
train.channels_last = True
train.checkpointer.period = 2000
train.checkpoint_keep_every = 10000

dataloader.train.total_batch_size = 2048
dataloader.train.dataset.regions = "regions/imagenet_train.arrow"
dataloader.train.dataset.recipe = "soco-v1"
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(SoCoViews)(
    sizes=[224, 224, 112],
    # As released, view 3 is an independent crop. In the paper's figure it is view 2 at half the
    # size: ["crop", 0].
    sources=["crop", "crop"],
    first_photometry=_augmentation.first,
    other_photometry=_augmentation.second,
    num_regions=4,
    crop_area=(0.5, 1.0),
    jitter_prob=0.5,
    jitter_ratio=0.1,
    min_box_side=0.0,
)


#: The C4 variant: two views, no box jitter.
C4_VIEWS = dict(sizes=[224, 224], sources=["crop"], crop_area=(0.6, 1.0), jitter_prob=0.0)


def pretrain(detector: DictConfig) -> DictConfig:
    """SoCo for 100 epochs on an R-CNN with FPN or C4 (``--method soco``).

    Args:
        detector: ``model`` of a detection config.
    """
    train.update(epochs=100, output_dir="output/soco")
    if has(detector, "roi_heads.res5"):
        dataloader.train.dataset.views.update(C4_VIEWS)
        return soco_c4(detector)
    require(
        detector,
        "roi_heads.box_head.fc_dims.0",
        otherwise="SoCo needs an R-CNN with one box head, or with res5 as in C4; for other "
        "detectors with an FPN, use --method moco, byol, point_region or (R-CNN only) ccop",
    )
    return soco_fpn(detector)


def _soco(detector: DictConfig, feature_dim: int, hidden_dim: int, dim: int, **parts) -> DictConfig:
    return L(SoCo)(
        backbone=detector.backbone,
        projector=L(MLPHead)(input_dim=feature_dim, hidden_dim=hidden_dim, output_dim=dim),
        predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
        momentum=L(cosine_momentum)(start=0.99),
        sources="${dataloader.train.dataset.views.sources}",
        zero_init=True,
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
        **parts,
    )


def soco_fpn(detector: DictConfig, hidden_dim: int = 4096, dim: int = 256) -> DictConfig:
    """SoCo on the backbone, pooler and box head of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        hidden_dim, dim: hidden and output channels of projector and predictor.
    """
    heads = detector.roi_heads
    return _soco(
        detector,
        heads.box_head.fc_dims[-1],
        hidden_dim,
        dim,
        in_features=heads.box_in_features,
        pooler=heads.box_pooler,
        head=heads.box_head,
        level_scales=[48, 96, 192, 224],
        # True: head on all levels: the released code's batch-norm statistics, 4 times the work.
        all_levels=False,
    )


def soco_c4(detector: DictConfig, hidden_dim: int = 4096, dim: int = 256) -> DictConfig:
    """SoCo on the backbone, pooler and res5 of a C4 detector."""
    heads = detector.roi_heads
    return _soco(
        detector,
        heads.res5.out_channels,
        hidden_dim,
        dim,
        in_features=heads.in_features,
        pooler=heads.pooler,
        head=heads.res5,
        head_name="res5",
    )
