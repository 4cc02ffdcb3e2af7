"""What all MCL recipes share. Leaves choose detector, data and length."""

from detectron2.config import LazyCall as L
from omegaconf import DictConfig
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.modeling.detector import require
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.projects.mcl import (
    MCL,
    MCLViews,
    Montage,
    PseudoLevels,
    SupervisedMCL,
    mcl_param_groups,
)
from region_pretrain.solver import cosine_momentum, warmup_times_cosine

optimizer = get_config("common/optim.py").lars
optimizer.params = L(mcl_param_groups)(weight_decay=1e-5, released_exclusions=False)
optimizer.form = "original"

# The cosine spans all epochs and is multiplied by the warm-up.
lr_multiplier = L(warmup_times_cosine)(
    epochs="${train.epochs}",
    warmup_epochs=10,
    warmup_factor=1e-4,
    final_factor=6.25e-6,  # 1e-4 of 16.0
)

train = get_config("common/train.py").train
train.base_batch_size = 256  # lr 1.0 * 4096 / 256 = 16.0
train.amp.enabled = True
train.channels_last = True
train.clip_grad.enabled = True
train.clip_grad.max_norm = 500.0
train.checkpointer.period = 1248  # 4 epochs of 312

dataloader = get_config("common/data/unlabeled.py").dataloader
dataloader.train.total_batch_size = 4096
dataloader.train.num_workers = 7
dataloader.train.dataset.labels = False
_augmentation = get_config("common/byol_augmentation.py")
dataloader.train.dataset.views = L(MCLViews)(
    montage=L(Montage)(
        size=224,
        ratios=[1, 2, 4, 8],  # tiles of 224, 112, 56, 28 pixels on P5, P4, P3, P2
        images_per_canvas=[1, 4, 16, 32],  # 128, 32, 8, 4 canvases for 128 images
        shrink="nearest",  # as released; "area" and "bilinear" do not alias
    ),
    query_photometry=_augmentation.first,
    key_photometry=_augmentation.second,
    crop_area=(0.2, 1.0),
)


def pretrain(detector: DictConfig) -> DictConfig:
    """MCL for 100 epochs on an R-CNN with FPN (``--method mcl``).

    Its fc layers are trained as well if the box head has no convolutions.

    Args:
        detector: ``model`` of a detection config.
    """
    require(
        detector,
        "backbone.bottom_up",
        "roi_heads.box_head",
        otherwise="MCL needs an R-CNN with an FPN and one box head; for C4, use --method soco or "
        "point_region, for other detectors with an FPN moco, byol or point_region",
    )
    train.update(epochs=100, output_dir="output/mcl")
    return mcl_fpn(detector, fc=not detector.roi_heads.box_head.conv_dims)


def _tile_model(target: type, detector: DictConfig, fc: bool, **parts) -> DictConfig:
    """``fc=False`` removes the box head's fc layers: its last maps are averaged."""
    head = detector.roi_heads.box_head
    if not fc:
        head.fc_dims = []
    return L(target)(
        backbone=detector.backbone,
        pooler=detector.roi_heads.box_pooler,
        head=head,
        montage="${dataloader.train.dataset.views.montage}",
        # "all": the released code's batch-norm statistics, several times the work.
        compute="windows",
        level_weights=[1 / 2, 1 / 4, 1 / 8, 1 / 8],
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format=detector.input_format,
        **parts,
    )


def _width(detector: DictConfig, fc: bool) -> int:
    head = detector.roi_heads.box_head
    return head.fc_dims[-1] if fc else head.conv_dims[-1]


def mcl_fpn(
    detector: DictConfig, hidden_dim: int = 2048, dim: int = 256, fc: bool = False
) -> DictConfig:
    """MCL on the backbone and the box head of an FPN detector.

    Args:
        detector: ``model`` of a config in ``configs/detection``; modified in place.
        hidden_dim, dim: hidden and output channels of projector and predictors.
        fc: train the box head's fc layers as well, so that the complete head transfers.
    """
    return _tile_model(
        MCL,
        detector,
        fc,
        projector=L(MLPHead)(
            input_dim=_width(detector, fc), hidden_dim=hidden_dim, output_dim=dim, final_norm=True
        ),
        predictor=L(MLPHead)(input_dim=dim, hidden_dim=hidden_dim, output_dim=dim),
        momentum=L(cosine_momentum)(start=0.99),
        temperature=1.0,
        pairing="top",
    )


def mcl_backbone(detector: DictConfig, channels: int, **dims: int) -> DictConfig:
    """MCL on the bottom-up backbone alone: levels are upsampled from C5, the FPN is not trained.

    Args:
        detector: as for :func:`mcl_fpn`.
        channels: channels of C5, 2048 for ResNet-50.
        dims: further arguments of :func:`mcl_fpn`.
    """
    model = mcl_fpn(detector, **dims)
    model.neck = L(PseudoLevels)(in_channels=channels, out_channels=detector.backbone.out_channels)
    model.backbone = detector.backbone.bottom_up
    return model


def supervised_fpn(detector: DictConfig, num_classes: int, fc: bool = False) -> DictConfig:
    """Classify tiles into their image's class, on the same modules as :func:`mcl_fpn`.

    Args:
        detector, fc: as for :func:`mcl_fpn`.
        num_classes: number of classes of the labelled images.
    """
    classifier = L(nn.Linear)(in_features=_width(detector, fc), out_features=num_classes)
    return _tile_model(SupervisedMCL, detector, fc, classifier=classifier)
