"""What all CCOP recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from fvcore.common.param_scheduler import ConstantParamScheduler
from omegaconf import DictConfig

from region_pretrain.config import get_config
from region_pretrain.modeling.detector import last_map, require
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.projects.ccop import CCOP, CCOPViews, Curriculum

_shared = get_config("common/moco_family.py")
optimizer, lr_multiplier, train = _shared.optimizer, _shared.lr_multiplier, _shared.train
dataloader = _shared.dataloader

optimizer.lr = 0.3
lr_multiplier.update(warmup_epochs=10, warmup_factor=1e-4, rescale=False)
train.checkpointer.period = 2310  # 5 ep of COCO
train.checkpoint_keep_every = 23_100  # 50 ep

_dataset = dataloader.train.dataset
_dataset.names = "coco_2017_train_images"
_dataset.regions = "regions/coco_2017_train_ccop.arrow"
_dataset.recipe = "ccop-v1"
_dataset.views = L(CCOPViews)(
    size=224,
    photometry=_shared.photometry,
    num_regions=50,
    crop_areas=[(0.1, 1.0), (0.1, 1.0)],
    min_visible=0.6,
    min_area=144.0,
)
_dataset.views.photometry.saturation = 0.2


def pretrain(detector: DictConfig) -> DictConfig:
    """CCOP for 200 epochs on an R-CNN with FPN (``--method ccop``).

    Args:
        detector: ``model`` of a detection config.
    """
    require(
        detector,
        "backbone.bottom_up",
        "roi_heads.box_pooler",
        otherwise="CCOP needs an R-CNN with an FPN; for C4, use --method soco or point_region, "
        "for other detectors with an FPN moco, byol or point_region",
    )
    train.update(epochs=200, output_dir="output/ccop")
    return ccop_fpn(detector, trunk_dim=last_map(detector.backbone.bottom_up)[1])


def ccop_fpn(
    detector: DictConfig, trunk_dim: int = 2048, hidden_dim: int = 2048, dim: int = 128
) -> DictConfig:
    """CCOP on the backbone and the box pooler of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``.
        trunk_dim: channels of the trunk's last map.
        hidden_dim, dim: hidden and output channels of the two heads.
    """
    heads = detector.roi_heads
    pooled = detector.backbone.out_channels * heads.box_pooler.output_size**2
    head = dict(hidden_dim=hidden_dim, output_dim=dim, norm="", dropout=0.1, init_std=0.01)
    return L(CCOP)(
        backbone=detector.backbone,
        in_features=heads.box_in_features,
        pooler=heads.box_pooler,
        image_head=L(MLPHead)(input_dim=trunk_dim, **head),
        region_head=L(MLPHead)(input_dim=pooled, **head),
        image_queue=L(KeyQueue)(length=65_536, dim=dim),
        region_queue=L(KeyQueue)(length=65_536, dim=dim),
        # (at the start of training, at the end). For the closed loop:
        # curriculum.feedback=L(Feedback)(set_point=0.8, gain=0.1, period=10)
        curriculum=L(Curriculum)(
            center=(0.15, 0.6), log_size=(0.35, 1.4), iou_floor=(0.8, 0.4), feedback=None
        ),
        momentum=L(ConstantParamScheduler)(value=0.999),
        temperature=0.2,
        image_weight=1.0,
        inter_weight=1.0,
        intra_weight=1.0,
        margin=0.4,
        max_pair_iou=0.05,
        anchor="column",
        num_candidates=10,
        hardest=True,
        level_scales=[48, 96, 192, 224],
        # True: shuffling BN, i.e. per-GPU batch norm. False: the detector's SyncBN.
        shuffle=True,
        seed="${train.seed}",
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
    )
