"""Pre-training from a config."""

from __future__ import annotations

import logging

from detectron2.config import instantiate
from omegaconf import DictConfig

from region_pretrain.config import complete_train
from region_pretrain.engine.run import (
    TrainingData,
    build_pretraining_model,
    run_training,
)
from region_pretrain.engine.setup import start_run
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)


def do_pretrain(cfg: DictConfig, resume: bool = False) -> dict[str, float]:
    """Pre-train a detector's modules without labels.

    Args:
        cfg: an object with the following fields:

            - ``model``: lazy :class:`~region_pretrain.modeling.meta_arch.PretrainingModel`.
            - ``dataloader.train``: lazy loader with ``total_batch_size``, ``iterations_per_epoch``
              and ``iterate(start_iter, stop_iter)``. Its ``seed``, where null, is ``train.seed``.
            - ``optimizer``: lazy; ``params.model`` is filled in. ``lr`` is scaled by
              ``total_batch_size / train.base_batch_size``, where that is not null.
            - ``lr_multiplier``: lazy fvcore ``ParamScheduler``.
            - ``train``: every key of ``configs/common/train.py`` but ``eval_period`` and
              ``precise_bn``; what is left out takes its default from there.
        resume: continue the run in ``train.output_dir``, with the same config.

    Returns:
        The newest value of each metric.

    Raises:
        UserError: the config, the data or the output folder does not fit.
        FloatingPointError: a loss became NaN or infinite.
    """
    complete_train(cfg)
    if "evaluator" in cfg.dataloader:
        raise UserError("the config is for tools/train_net.py: it trains a detector on boxes")
    start_run(cfg, resume)
    loader_cfg = cfg.dataloader.train
    if "seed" in list(loader_cfg.keys()) and loader_cfg.seed is None:
        loader_cfg.seed = cfg.train.seed
    loader = instantiate(loader_cfg)
    data = TrainingData(loader.iterate, loader.total_batch_size, loader.iterations_per_epoch)
    _, metrics = run_training(
        cfg, data, resume=resume, load_weights=load_pretrained, build=build_pretraining_model
    )
    return metrics
