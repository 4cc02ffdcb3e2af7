"""Converts a yacs config to the five parts of a LazyConfig."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
    get_detection_dataset_dicts,
)
from detectron2.data.detection_utils import create_keypoint_hflip_indices
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import (
    CosineParamScheduler,
    MultiStepParamScheduler,
    StepWithFixedGammaParamScheduler,
)
from omegaconf import DictConfig

from region_pretrain.errors import UserError
from region_pretrain.yacs.build import build_detector, build_evaluator, sgd_with_tensor_clipping
from region_pretrain.yacs.detector import plain

#: Keys that have no counterpart -> the value that they must have.
_REFUSED = {
    "SOLVER.REFERENCE_WORLD_SIZE": 0,
    "TEST.AUG.ENABLED": False,
    "TEST.EXPECTED_RESULTS": [],
    "FLOAT32_PRECISION": "",
}


def to_lazy_config(cfg: CfgNode) -> DictConfig:
    """Convert a yacs config to a LazyConfig that trains and evaluates the same.

    ``model`` contains the complete yacs config and builds the detector from it. The other parts
    are those of a LazyConfig, so that ``dataloader.*``, ``optimizer.*``, ``lr_multiplier.*`` and
    ``train.*`` can be overridden as usual. Keys of ``train`` that yacs configs do not have are
    absent.

    Args:
        cfg: a complete yacs config.

    Raises:
        UserError: a key has a value that has no counterpart; the message names it.
    """
    for key, value in _REFUSED.items():
        node: Any = cfg
        for part in key.split("."):
            node = node[part]
        if node != value:
            raise UserError(f"{key}={node} is not supported: set {key}={value!r}")
    return DictConfig(
        dict(
            model=L(build_detector)(cfg=plain(cfg)),
            dataloader=_dataloader(cfg),
            optimizer=_optimizer(cfg),
            lr_multiplier=_lr_multiplier(cfg),
            train=_train(cfg),
        ),
        flags={"allow_objects": True},
    )


def _dataloader(cfg: CfgNode) -> dict[str, Any]:
    if len(cfg.DATASETS.TEST) != 1 or not cfg.DATASETS.TRAIN:
        raise UserError(
            f"DATASETS.TRAIN={list(cfg.DATASETS.TRAIN)} DATASETS.TEST={list(cfg.DATASETS.TEST)}: "
            "name at least one training set and exactly one test set, e.g. DATASETS.TEST=NAME"
        )
    train = L(build_detection_train_loader)(
        dataset=_dataset(cfg, "TRAIN"),
        mapper=_mapper(cfg, is_train=True),
        total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
        aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
    )
    sampler = cfg.DATALOADER.SAMPLER_TRAIN
    if sampler == "RepeatFactorTrainingSampler":
        train.sampler = L(RepeatFactorTrainingSampler)(
            repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
                dataset_dicts="${dataloader.train.dataset}",
                repeat_thresh=cfg.DATALOADER.REPEAT_THRESHOLD,
                sqrt=cfg.DATALOADER.REPEAT_SQRT,
            ),
            seed="${train.seed}",
        )
    elif sampler != "TrainingSampler":  # the engine's default, with the run's seed
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN={sampler}: must be TrainingSampler or "
            "RepeatFactorTrainingSampler"
        )
    return dict(
        train=train,
        test=L(build_detection_test_loader)(
            dataset=_dataset(cfg, "TEST"),
            mapper=_mapper(cfg, is_train=False),
            num_workers=cfg.DATALOADER.NUM_WORKERS,
        ),
        evaluator=L(build_evaluator)(
            dataset_name="${..test.dataset.names}",
            output_dir="${train.output_dir}/inference",
            keypoint_oks_sigmas=list(cfg.TEST.KEYPOINT_OKS_SIGMAS),
        ),
    )


def _dataset(cfg: CfgNode, split: str) -> DictConfig:
    names = list(cfg.DATASETS[split])
    dataset = L(get_detection_dataset_dicts)(
        names=names[0] if len(names) == 1 else names, filter_empty=False
    )
    if split == "TRAIN":
        dataset.filter_empty = cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
        if cfg.MODEL.KEYPOINT_ON:
            dataset.min_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    if cfg.MODEL.LOAD_PROPOSALS:
        files = list(cfg.DATASETS[f"PROPOSAL_FILES_{split}"])
        if len(files) != len(names):
            raise UserError(
                f"DATASETS.PROPOSAL_FILES_{split}={files}: one file for each of {names}"
            )
        dataset.proposal_files = files
    return dataset


def _mapper(cfg: CfgNode, is_train: bool) -> DictConfig:
    """``DatasetMapper.from_config`` and ``build_augmentation``, lazily."""
    source, split = cfg.INPUT, "TRAIN" if is_train else "TEST"
    resize = L(T.ResizeShortestEdge)(
        short_edge_length=source[f"MIN_SIZE_{split}"],
        max_size=source[f"MAX_SIZE_{split}"],
        sample_style=source.MIN_SIZE_TRAIN_SAMPLING if is_train else "choice",
    )
    augmentations = [resize]
    if is_train and source.RANDOM_FLIP != "none":
        flip = L(T.RandomFlip)(
            horizontal=source.RANDOM_FLIP == "horizontal",
            vertical=source.RANDOM_FLIP == "vertical",
        )
        augmentations.append(flip)
    crop = is_train and source.CROP.ENABLED
    if crop:
        crop_size = list(source.CROP.SIZE)
        augmentations.insert(0, L(T.RandomCrop)(crop_type=source.CROP.TYPE, crop_size=crop_size))
    mapper = L(DatasetMapper)(
        is_train=is_train,
        augmentations=augmentations,
        image_format=source.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=source.MASK_FORMAT,
        use_keypoint=cfg.MODEL.KEYPOINT_ON,
        recompute_boxes=crop and cfg.MODEL.MASK_ON,
    )
    if cfg.MODEL.KEYPOINT_ON:
        mapper.keypoint_hflip_indices = L(create_keypoint_hflip_indices)(
            dataset_names="${dataloader.train.dataset.names}"
        )
    if cfg.MODEL.LOAD_PROPOSALS:
        mapper.precomputed_proposal_topk = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
    return mapper


def _optimizer(cfg: CfgNode) -> DictConfig:
    solver = cfg.SOLVER
    optimizer = L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(
            base_lr="${..lr}",
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        ),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )
    clip = solver.CLIP_GRADIENTS
    if clip.ENABLED and clip.CLIP_TYPE == "norm":  # of each tensor; train.clip_grad: of all
        optimizer._target_ = sgd_with_tensor_clipping
        optimizer.clip_norm, optimizer.norm_type = clip.CLIP_VALUE, clip.NORM_TYPE
    return optimizer


def _lr_multiplier(cfg: CfgNode) -> DictConfig:
    """``detectron2.solver.build_lr_scheduler``, lazily."""
    solver = cfg.SOLVER
    if solver.MAX_ITER < 1:
        raise UserError(f"SOLVER.MAX_ITER={solver.MAX_ITER}: must be at least 1")
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        # Detectron2 ignores later ones; one at the end would drop the rate after it.
        steps = [step for step in solver.STEPS if step < solver.MAX_ITER]
        scheduler = L(MultiStepParamScheduler)(
            values=[solver.GAMMA**k for k in range(len(steps) + 1)],
            milestones=steps,
            num_updates=solver.MAX_ITER,
        )
    elif solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        if solver.BASE_LR <= 0:
            raise UserError(f"SOLVER.BASE_LR={solver.BASE_LR}: must be above 0 for WarmupCosineLR")
        scheduler = L(CosineParamScheduler)(
            start_value=1, end_value=solver.BASE_LR_END / solver.BASE_LR
        )
    elif solver.LR_SCHEDULER_NAME == "WarmupStepWithFixedGammaLR":
        scheduler = L(StepWithFixedGammaParamScheduler)(
            base_value=1.0,
            gamma=solver.GAMMA,
            num_decays=solver.NUM_DECAYS,
            num_updates=solver.MAX_ITER,
        )
    else:
        raise UserError(
            f"SOLVER.LR_SCHEDULER_NAME={solver.LR_SCHEDULER_NAME}: must be WarmupMultiStepLR, "
            "WarmupCosineLR or WarmupStepWithFixedGammaLR"
        )
    return L(WarmupParamScheduler)(
        scheduler=scheduler,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_method=solver.WARMUP_METHOD,
        rescale_interval=solver.RESCALE_INTERVAL,
    )


def _train(cfg: CfgNode) -> dict[str, Any]:
    device = cfg.MODEL.DEVICE
    if device not in ("cuda", "cpu"):
        raise UserError(f"MODEL.DEVICE={device}: must be cuda or cpu")
    clip = cfg.SOLVER.CLIP_GRADIENTS
    train = dict(
        output_dir=cfg.OUTPUT_DIR,
        init_checkpoint=cfg.MODEL.WEIGHTS,
        max_iter=cfg.SOLVER.MAX_ITER,
        device="cpu" if device == "cpu" else None,  # null: a GPU if there is one
        amp=dict(enabled=cfg.SOLVER.AMP.ENABLED, dtype="float16"),
        cudnn_benchmark=cfg.CUDNN_BENCHMARK,
        float32_matmul_precision="highest",  # PyTorch's own, which an empty FLOAT32_PRECISION keeps
        checkpointer=dict(period=cfg.SOLVER.CHECKPOINT_PERIOD, max_to_keep=None),
        eval_period=cfg.TEST.EVAL_PERIOD,
        precise_bn=dict(enabled=cfg.TEST.PRECISE_BN.ENABLED, num_iter=cfg.TEST.PRECISE_BN.NUM_ITER),
    )
    if clip.ENABLED and clip.CLIP_TYPE == "value":
        train["clip_grad"] = dict(enabled=True, max_value=clip.CLIP_VALUE)
    elif clip.ENABLED and clip.CLIP_TYPE == "full_model":  # Mask2Former's and others'
        train["clip_grad"] = dict(enabled=True, max_norm=clip.CLIP_VALUE)
    elif clip.ENABLED and clip.CLIP_TYPE != "norm":
        raise UserError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE={clip.CLIP_TYPE}: must be value, norm (of each "
            "tensor) or full_model"
        )
    if cfg.SEED >= 0:
        train["seed"] = cfg.SEED
    return train
