"""What pre-training and fine-tuning share: from a config to a finished run."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.engine import HookBase, create_ddp_model, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import distributed as dist
from torch import nn

from region_pretrain.engine.checkpoint import RunCheckpointer, check_free_space
from region_pretrain.engine.hooks import CheckpointHook, CollapseWarning
from region_pretrain.engine.preemption import StopRequest
from region_pretrain.engine.setup import resolve_device
from region_pretrain.engine.trainer import Trainer
from region_pretrain.engine.writers import build_writers
from region_pretrain.errors import UserError
from region_pretrain.metrics import newest_metrics
from region_pretrain.modeling.meta_arch import (
    PretrainingModel,
    check_contract,
    renew_momentum_copies,
)
from region_pretrain.modeling.norms import use_cpu_sync_batchnorm
from region_pretrain.modeling.trunk import compile_trunks

logger = logging.getLogger(__name__)

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class TrainingData:
    """Where batches come from.

    Attributes:
        iterate: (first iteration, max_iter) -> this process's batch of each iteration.
        total_batch_size: images an iteration over all processes.
        iterations_per_epoch: None where the data has no such notion.
    """

    iterate: Callable[[int, int], Iterable[Any]]
    total_batch_size: int
    iterations_per_epoch: int | None = None


def resolve_max_iter(train: DictConfig, iterations_per_epoch: int | None) -> int:
    """``train.max_iter``, or ``train.epochs`` in iterations.

    Raises:
        UserError: neither is set, or it comes to no iteration.
    """
    if train.max_iter is not None:
        max_iter = int(train.max_iter)
    elif train.epochs is None:
        raise UserError("set how long to train: train.epochs or train.max_iter")
    elif not iterations_per_epoch:
        raise UserError(
            f"train.epochs={train.epochs}, but an epoch has no whole batch: the data set is empty, "
            "smaller than dataloader.train.total_batch_size, or endless (then set train.max_iter)"
        )
    else:
        max_iter = int(train.epochs * iterations_per_epoch)
    if max_iter < 1:
        raise UserError(f"train.max_iter={max_iter}: there is nothing to train")
    if train.log_period < 1 or train.accumulate_steps < 1:
        raise UserError(
            f"train.log_period={train.log_period} and train.accumulate_steps="
            f"{train.accumulate_steps} must be at least 1"
        )
    return max_iter


def scale_lr(cfg: DictConfig, data: TrainingData, max_iter: int) -> float:
    """Scale ``optimizer.lr`` linearly with the batch size, and log that and the run's length.

    Returns:
        ``optimizer.lr * total_batch_size / train.base_batch_size``; unscaled where that is null.
    """
    lr, base = cfg.optimizer.lr, cfg.train.base_batch_size
    text = f"lr {lr:g}"
    if base is not None:
        text = f"lr {lr:g} * {data.total_batch_size} / {base} = "
        lr = lr * data.total_batch_size / base
        text += f"{lr:g}"
    if cfg.train.max_iter is None:
        text += (
            f", {cfg.train.epochs:g} epochs * {data.iterations_per_epoch} = {max_iter} iterations"
        )
    else:
        text += f", {max_iter} iterations"
        if data.iterations_per_epoch:
            text += f" = {max_iter / data.iterations_per_epoch:.4g} epochs"
    logger.info("%s of %d images", text, data.total_batch_size)
    return lr


def build_model(cfg: DictConfig, device: torch.device) -> nn.Module:
    """Instantiate ``cfg.model`` on a device: the same weights in every process."""
    seed_all_rng(cfg.train.seed)
    model = instantiate(cfg.model).to(device)
    seed_all_rng(cfg.train.seed + comm.get_rank())
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if device.type == "cpu" and dist.is_available() and dist.is_initialized():
        model = use_cpu_sync_batchnorm(model)
    return model


def build_pretraining_model(cfg: DictConfig, device: torch.device) -> PretrainingModel:
    """As :func:`build_model`, for a pre-training config.

    Raises:
        UserError: ``cfg.model`` builds something that cannot be pre-trained.
    """
    return check_contract(build_model(cfg, device))


def build_optimizer(cfg: DictConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Instantiate ``cfg.optimizer`` over a model's parameters.

    Args:
        cfg: ``cfg.optimizer.params.model`` is filled in, in a copy.
        model: not wrapped in DDP, so that parameter names are the model's own.
        lr: replaces ``cfg.optimizer.lr``.
    """
    config = copy.deepcopy(cfg.optimizer)
    config.params.model = model
    config.lr = lr
    optimizer = instantiate(config)
    for group in [optimizer.defaults, *optimizer.param_groups]:
        for key, value in group.items():  # a ListConfig (betas) would not load weights_only
            if isinstance(value, ListConfig | DictConfig):
                group[key] = OmegaConf.to_container(value, resolve=True)
    return optimizer


def _wrap(cfg: DictConfig, model: nn.Module, device: torch.device) -> nn.Module:
    if cfg.train.compile:
        compile_trunks(model)
    ddp = dict(cfg.train.ddp)
    # The device's own number: a task of a job may see no GPU but its own.
    ddp["device_ids"] = None if device.type == "cpu" else [device.index]
    return create_ddp_model(model, **ddp)


def amp_dtype(amp: Mapping[str, Any], device: torch.device) -> torch.dtype | None:
    """``train.amp`` as a dtype; None where it is off.

    Raises:
        UserError: a name that is no half-precision dtype.
    """
    if not amp["enabled"]:
        return None
    name = amp.get("dtype", "float16")
    if name not in _AMP_DTYPES:
        raise UserError(f"train.amp.dtype={name}: must be one of {', '.join(_AMP_DTYPES)}")
    if device.type == "cpu" and name == "float16":
        logger.warning("train.amp.dtype=float16 needs a GPU: using bfloat16 on the CPU")
        return torch.bfloat16
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if name == "bfloat16" and on_gpu and torch.cuda.get_device_capability() < (8, 0):
        logger.warning("this GPU has no bfloat16 units: set train.amp.dtype=float16")
    return _AMP_DTYPES[name]


def _clipping(clip: Mapping[str, Any]) -> dict[str, float | None]:
    if not clip["enabled"]:
        return {}
    if clip["max_value"] is not None:
        return {"max_value": clip["max_value"]}
    return {"max_norm": clip["max_norm"]}


def _check_batch(cfg: DictConfig, data: TrainingData) -> None:
    world, total = comm.get_world_size(), data.total_batch_size
    if total % world or total // world < cfg.train.accumulate_steps:
        raise UserError(
            f"dataloader.train.total_batch_size={total} must be a multiple of the {world} "
            f"processes, with at least train.accumulate_steps={cfg.train.accumulate_steps} "
            "images for each"
        )


def _check_space(output_dir: str, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """The main process looks; all stop together."""
    problem = None
    if comm.is_main_process():
        try:
            check_free_space(output_dir, model, optimizer)
        except UserError as error:
            problem = str(error)
    problem = comm.all_gather(problem)[0]
    if problem:
        raise UserError(problem)


def run_training(
    cfg: DictConfig,
    data: TrainingData,
    *,
    resume: bool,
    load_weights: Callable[[nn.Module, str], Any],
    build: Callable[[DictConfig, torch.device], nn.Module] = build_model,
    make_hooks: Callable[[Trainer], list[HookBase]] = lambda trainer: [],
) -> tuple[nn.Module, dict[str, float]]:
    """Train ``cfg.model`` from its start, or from its newest checkpoint, to its end.

    Args:
        cfg: ``train`` is complete; :func:`region_pretrain.engine.setup.start_run` has been called.
        data: the batches.
        resume: go on from the newest checkpoint in ``train.output_dir``.
        load_weights: (model, ``train.init_checkpoint``) -> fills a model that starts anew. Then
            the momentum copies of a ``PretrainingModel`` are renewed.
        build: (config, device) -> the model.
        make_hooks: further hooks, between the learning rate and ``train.hooks``.

    Returns:
        The trained model without DDP, and the newest value of each metric (on the main process).

    Raises:
        Stopped: USR2 (in a job: or TERM) came; a checkpoint of the last step is there.
    """
    train = cfg.train
    device = resolve_device(train.device)
    _check_batch(cfg, data)
    max_iter = resolve_max_iter(train, data.iterations_per_epoch)
    lr = scale_lr(cfg, data, max_iter)

    model = build(cfg, device)
    optimizer = build_optimizer(cfg, model, lr)
    scheduler = LRMultiplier(optimizer, instantiate(cfg.lr_multiplier), max_iter)
    trainer = Trainer(
        _wrap(cfg, model, device),
        optimizer,
        data.iterate,
        device=device,
        amp_dtype=amp_dtype(train.amp, device),
        accumulate_steps=train.accumulate_steps,
        log_period=train.log_period,
        **_clipping(train.clip_grad),
    )
    checkpointer = RunCheckpointer(
        model,
        train.output_dir,
        run={
            "max_iter": max_iter,
            "total_batch_size": data.total_batch_size,
            "world_size": comm.get_world_size(),
        },
        allow_world_size_change=train.allow_world_size_change,
        optimizer=optimizer,
        scheduler=scheduler,
        scaler=trainer.scaler,
    )
    checkpointer.trainer = trainer
    trainer.last_checkpoint = checkpointer.last_good
    _check_space(train.output_dir, model, optimizer)
    trainer.register_hooks(
        [
            hooks.LRScheduler(optimizer, scheduler),
            *make_hooks(trainer),
            *instantiate(train.hooks),
            CollapseWarning(),
        ]
    )

    start_iter = checkpointer.resume() if resume else 0
    if start_iter == 0 and train.init_checkpoint:
        load_weights(model, train.init_checkpoint)
        if isinstance(model, PretrainingModel):
            renew_momentum_copies(model)
    if start_iter >= max_iter:
        logger.info("%s is finished: %d iterations", train.output_dir, start_iter)
        return model, newest_metrics(train.output_dir)

    if comm.is_main_process():
        writers = build_writers(train.output_dir, start_iter, max_iter)
        trainer.register_hooks([hooks.PeriodicWriter(writers, train.log_period)])
    stop = StopRequest()
    trainer.register_hooks([CheckpointHook(checkpointer, **train.checkpointer, stop=stop.agreed)])
    with stop.listen():
        trainer.train(start_iter, max_iter)
    stop.close()
    return model, {name: value for name, (value, _) in trainer.storage.latest().items()}
