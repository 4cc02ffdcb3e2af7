"""Where a converted config has what a key of its yacs config says."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from region_pretrain.errors import UserError
from region_pretrain.yacs.build import build_detector

_OF_THE_SCHEDULE = (
    *("STEPS", "GAMMA", "LR_SCHEDULER_NAME", "NUM_DECAYS"),
    *("WARMUP_FACTOR", "WARMUP_ITERS", "WARMUP_METHOD"),
)
#: Key, or the group of keys, of a yacs config -> of the converted config.
_COUNTERPARTS = {
    "OUTPUT_DIR": "train.output_dir",
    "SEED": "train.seed",
    "MODEL.WEIGHTS": "train.init_checkpoint",
    "MODEL.DEVICE": "train.device",
    "SOLVER": "optimizer.*",
    "SOLVER.BASE_LR": "optimizer.lr",
    "SOLVER.MOMENTUM": "optimizer.momentum",
    "SOLVER.WEIGHT_DECAY": "optimizer.weight_decay",
    "SOLVER.MAX_ITER": "train.max_iter",
    "SOLVER.IMS_PER_BATCH": "dataloader.train.total_batch_size",
    "SOLVER.CHECKPOINT_PERIOD": "train.checkpointer.period",
    "SOLVER.AMP.ENABLED": "train.amp.enabled",
    "SOLVER.CLIP_GRADIENTS": "train.clip_grad.*",
    **{f"SOLVER.{name}": "lr_multiplier.*" for name in _OF_THE_SCHEDULE},
    "INPUT": "dataloader.train.mapper.*",
    "INPUT.MIN_SIZE_TEST": "dataloader.test.mapper.*",
    "INPUT.MAX_SIZE_TEST": "dataloader.test.mapper.*",
    "DATASETS.TRAIN": "dataloader.train.dataset.names",
    "DATASETS.TEST": "dataloader.test.dataset.names",
    "DATASETS": "dataloader.train.dataset.* and dataloader.test.dataset.*",
    "DATALOADER": "dataloader.train.*",
    "DATALOADER.NUM_WORKERS": "dataloader.train.num_workers and dataloader.test.num_workers",
    "TEST": "dataloader.evaluator.*",
    "TEST.EVAL_PERIOD": "train.eval_period",
    "TEST.PRECISE_BN": "train.precise_bn.*",
}
#: Keys in these groups that the detector itself reads.
_OF_THE_DETECTOR = ("INPUT.FORMAT", "TEST.DETECTIONS_PER_IMAGE")


def counterpart(key: str) -> str | None:
    """What to override in a converted config instead of a yacs key; None: ``model.cfg.KEY``."""
    if key in _OF_THE_DETECTOR:
        return None
    while key and key not in _COUNTERPARTS:
        key = key.rpartition(".")[0]
    return _COUNTERPARTS.get(key)


def refuse_converted_keys(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuse overrides of ``model.cfg`` that a converted config no longer reads.

    Raises:
        UserError: the message names the key to override instead.
    """
    model = cfg.get("model")
    target = model.get("_target_") if isinstance(model, DictConfig) else None
    if target not in (build_detector, f"{build_detector.__module__}.{build_detector.__name__}"):
        return
    for text in overrides:
        key = text.partition("=")[0].lstrip("+")
        instead = counterpart(key.removeprefix("model.cfg.")) if "model.cfg." in key else None
        if instead:
            raise UserError(
                f"override {text!r} has no effect once the config is converted: use {instead}"
            )


def refuse_weights(overrides: Sequence[str]) -> None:
    """Refuse overrides of a yacs detector that name weights: a pre-training does not load them.

    Raises:
        UserError: the message names the key to override instead.
    """
    for text in overrides:
        key, _, value = text.lstrip("+").partition("=")
        if key == "MODEL.WEIGHTS" and (file := value.strip("'\"")):
            raise UserError(
                f"override {text!r}: a pre-training does not start from its detector's weights: "
                f"use train.init_checkpoint={file}"
            )
