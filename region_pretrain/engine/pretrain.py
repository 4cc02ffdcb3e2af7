"""Pre-training from a config."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from detectron2.engine import HookBase
from omegaconf import DictConfig
from torch import nn

from region_pretrain.config import complete_train
from region_pretrain.data.sources import register_named
from region_pretrain.engine.build import TrainingData, build_part, build_pretraining_model
from region_pretrain.engine.refresh import RefreshedLoader
from region_pretrain.engine.run import check_start, run_training, start_run
from region_pretrain.engine.trainer import Trainer
from region_pretrain.errors import UserError


def do_pretrain(
    cfg: DictConfig,
    resume: bool = False,
    *,
    hooks: Sequence[HookBase] = (),
    build: Callable[[DictConfig, torch.device], nn.Module] = build_pretraining_model,
) -> dict[str, float]:
    """Pre-train a detector's modules without labels.

    Args:
        cfg: an object with the following fields:

            - ``model``: lazy :class:`~region_pretrain.modeling.meta_arch.PretrainingModel`.
            - ``dataloader.train``: lazy :class:`~region_pretrain.engine.build.TrainingData`.
            - ``optimizer``: lazy; ``params.model`` is filled in. ``lr`` is scaled by
              ``total_batch_size / train.base_batch_size`` unless that is null.
            - ``lr_multiplier``: lazy fvcore ``ParamScheduler``.
            - ``train``: the keys of ``configs/common/train.py`` except ``eval_period`` and
              ``precise_bn``; missing keys take their defaults from that file.
        resume: continue the run in ``train.output_dir``, with the same config.
        hooks: further hooks, which run before those in ``train.hooks``.
        build: (config, device) -> the model.

    Returns:
        The newest value of each metric.

    Raises:
        UserError: the config, the data or the output folder is invalid.
        FloatingPointError: a loss became NaN or infinite.
    """
    complete_train(cfg)
    if "evaluator" in cfg.dataloader:
        raise UserError("the config is for region-pretrain finetune: it trains a detector on boxes")
    register_named(cfg)
    with start_run(cfg, resume):
        loader = copy.deepcopy(cfg.dataloader.train)
        if cfg.train.device == "cpu" and "pin_memory" in loader:
            loader.pin_memory = False  # also on a machine with GPUs
        data = build_part(loader, "dataloader.train")
        if not isinstance(data, TrainingData):
            raise UserError(
                f"dataloader.train builds a {type(data).__name__}, which lacks total_batch_size, "
                "iterations_per_epoch or iterate(start_iter, stop_iter)"
            )
        if cfg.train.refresh_regions.epochs:
            data = RefreshedLoader(data, cfg.train.refresh_regions, cfg.train.output_dir)

        def make_hooks(trainer: Trainer) -> list[HookBase]:
            if isinstance(data, RefreshedLoader):
                data.attach(trainer.module)
            return list(hooks)

        metrics, _ = run_training(cfg, data, resume=resume, build=build, make_hooks=make_hooks)
        return metrics


class _Planned(NamedTuple):
    total_batch_size: int
    iterations_per_epoch: int


def check_before_regions(
    cfg: DictConfig,
    images: int,
    build: Callable[[DictConfig, torch.device], nn.Module] = build_pretraining_model,
) -> None:
    """Find what :func:`do_pretrain` would refuse at its start, while there are no regions yet.

    Args:
        cfg: complete; not changed.
        images: the size of the data set.
        build: see :func:`do_pretrain`.

    Raises:
        UserError: the views, fewer images than one batch, or see
            :func:`~region_pretrain.engine.run.check_start`.
    """
    batch, dataset = cfg.dataloader.train.total_batch_size, cfg.dataloader.train.dataset
    if images < batch:
        raise UserError(
            f"the data set has {images} images, fewer than one batch: lower batch_size={batch}"
        )
    if "views" in dataset:
        build_part(dataset.views, "dataloader.train.dataset.views")
    check_start(cfg, _Planned(batch, images // batch), build)
