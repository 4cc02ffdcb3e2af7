"""One training run, from a config to the last checkpoint, for pre-training and fine-tuning."""

from __future__ import annotations

import copy
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager

import torch
from detectron2.engine import HookBase, hooks
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig
from torch import distributed as dist
from torch import nn

from region_pretrain.convert.facts import facts_of
from region_pretrain.convert.recognise import check_weights
from region_pretrain.engine.build import (
    TrainingData,
    amp_dtype,
    build_model,
    build_optimizer,
    build_part,
    check_batch_size,
    clipping,
    log_schedule,
    resolve_device,
    resolve_max_iter,
    scale_lr,
    warn_of_few_steps,
    warn_of_long_queues,
    warn_of_single_images,
    wrap_model,
)
from region_pretrain.engine.checkpoint import RunCheckpointer
from region_pretrain.engine.checkpoint_file import check_free_space
from region_pretrain.engine.environment import write_environment
from region_pretrain.engine.fingerprint import Fingerprint, check_same_data
from region_pretrain.engine.hooks import (
    CheckpointHook,
    CollapseWarning,
    EvaluationHook,
    MetricsHook,
    StopTogether,
)
from region_pretrain.engine.kernels import use_fast_kernels
from region_pretrain.engine.labelled_data import Classes, compare_with_checkpoint
from region_pretrain.engine.memory import MORE_SHARED_MEMORY, check_shared_memory
from region_pretrain.engine.output_dir import (
    claim_output_dir,
    holds_run,
    save_config,
    start_logging,
)
from region_pretrain.engine.preemption import StopRequest
from region_pretrain.engine.processes import on_main_process
from region_pretrain.engine.trainable import check_trainable, freeze
from region_pretrain.engine.trainer import Trainer
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.engine.writer_list import check_writers
from region_pretrain.errors import DEAD_WORKER, ProcessKilled, UserError
from region_pretrain.files import is_disk_full
from region_pretrain.lease import hold
from region_pretrain.metrics import Results, newest_metrics
from region_pretrain.modeling.meta_arch import PretrainingModel, renew_momentum_copies
from region_pretrain.random_state import random_state_kept
from region_pretrain.solver import check_schedule
from region_pretrain.tracking.git import git_state
from region_pretrain.tracking.service import forget_tracked

logger = logging.getLogger(__name__)


@contextmanager
def start_run(cfg: DictConfig, resume: bool) -> Iterator[None]:
    """Claim ``train.output_dir``, save the config there, start logging and seed this process.

    Every process of a run enters this first. No other run can use the folder until the main process
    leaves it.

    Args:
        cfg: complete; a null ``train.seed`` is replaced by a number.
        resume: continue the run in the folder.

    Raises:
        UserError: another run is using the folder, there is no file ``train.init_checkpoint``, or
            see :func:`~region_pretrain.engine.output_dir.claim_output_dir`.
    """
    folder = cfg.train.output_dir
    if not (resume and holds_run(folder)):
        check_weights(cfg.train.init_checkpoint or "", "train.init_checkpoint: ")
    with ExitStack() as leases:

        def claim() -> int:
            check_writers(cfg.train)
            try:
                PathManager.mkdirs(folder)
                leases.enter_context(hold(folder))
                seed = claim_output_dir(cfg, resume)
            except OSError as error:
                raise UserError(f"cannot write to train.output_dir={folder}: {error}") from error
            if not resume:
                forget_tracked(folder)
            return seed

        cfg.train.seed = on_main_process(claim)
        seed_all_rng(cfg.train.seed + comm.get_rank())
        start_logging(folder)
        logger.info("rank %d of %d processes", comm.get_rank(), comm.get_world_size())
        # What follows in the report are 3000 characters of compiler flags.
        logger.info("environment:\n%s", collect_env_info().split("PyTorch built with")[0])
        logger.info("config: %s", os.path.join(folder, "config.yaml"))
        if comm.is_main_process():
            for place, state in git_state().items():
                changed = ", with uncommitted changes" if state["dirty"] else ""
                logger.info("commit of %s: %s%s", place, state["commit"], changed)
        yield


def run_training(
    cfg: DictConfig,
    data: TrainingData,
    *,
    resume: bool,
    classes: Classes | None = None,
    build: Callable[[DictConfig, torch.device], nn.Module] = build_model,
    make_hooks: Callable[[Trainer], list[HookBase]] = lambda trainer: [],
    evaluate: Callable[[nn.Module], Results] | None = None,
) -> tuple[dict[str, float], Results]:
    """Train ``cfg.model`` from its initialisation or its newest checkpoint to the last iteration.

    A new run first loads ``train.init_checkpoint``; the momentum copies of a ``PretrainingModel``
    are then made equal to their online networks. After each step come the learning rate,
    ``make_hooks``, ``train.hooks``, the checkpoint, the evaluation, pictures and metrics, in this
    order.

    Args:
        cfg: :func:`start_run` has been called with it.
        data: the batches.
        resume: continue from the newest checkpoint in ``train.output_dir``.
        classes: a detector's classes, kept in its checkpoints.
        build: (config, device) -> the model.
        make_hooks: hooks that run before ``train.hooks``.
        evaluate: see :class:`~region_pretrain.engine.hooks.EvaluationHook`; called every
            ``train.eval_period`` iterations and after the last one.

    Returns:
        The newest value of each metric, and the results of the final evaluation (on the main
        process).

    Raises:
        UserError: the processes have different data; or the final evaluation failed, and the final
            checkpoint has been saved.
        ProcessKilled: a loader's worker was killed.
        Stopped: a process received USR2, TERM or Ctrl-C; a checkpoint of the last finished step has
            been saved.
    """
    train = cfg.train
    device = resolve_device(train.device)
    if comm.is_main_process():
        write_environment(train.output_dir, device.type)
    use_fast_kernels(train, device)
    check_same_data(data)
    check_batch_size(cfg, data)
    check_shared_memory(data)
    max_iter = resolve_max_iter(train, data.iterations_per_epoch)
    lr = scale_lr(cfg, data, max_iter)
    fingerprint = Fingerprint(data, cfg, train.output_dir, train.allow_changed_data)
    with closing(fingerprint):  # an error must not wait for its threads
        model = build(cfg, device)
        optimizer, multiplier = _optimisation(cfg, data, model, max_iter, lr)
        scheduler = LRMultiplier(optimizer, multiplier, max_iter)
        trainer = Trainer(
            wrap_model(cfg, model, device),
            optimizer,
            data.iterate,
            device=device,
            amp_dtype=amp_dtype(train.amp, device),
            accumulate_steps=train.accumulate_steps,
            log_period=train.log_period,
            **clipping(train.clip_grad),
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
            classes=classes.names if classes else (),
            allow_new_length=train.allow_new_length,
            fingerprint=fingerprint,
            optimizer=optimizer,
            scheduler=scheduler,
            scaler=trainer.scaler,
        )
        trainer.cfg, trainer.loader = cfg, data  # for hooks
        checkpointer.trainer = trainer
        trainer.last_checkpoint = checkpointer.last_good
        has_one = resume and bool(checkpointer.last_good())
        on_main_process(lambda: check_free_space(train.output_dir, model, optimizer, has_one))
        stop = StopRequest()
        evaluation = None
        if evaluate is not None:
            evaluation = EvaluationHook(
                train.eval_period, evaluate, train.output_dir, checkpointer.last_good
            )
        checkpoints = CheckpointHook(
            checkpointer,
            **train.checkpointer,
            minutes=train.checkpoint_minutes,
            keep_every=train.checkpoint_keep_every,
            stop=stop.agreed,
            refresh_period=getattr(data, "refresh_period", 0),
        )
        trainer.register_hooks(
            [
                hooks.LRScheduler(optimizer, scheduler),
                *make_hooks(trainer),
                *_own_hooks(train),
                CollapseWarning(),
                checkpoints,
                evaluation,
                build_part(train.pictures, "train.pictures"),
                MetricsHook(cfg, evaluation, saved=lambda: checkpointer.saved),
                StopTogether(checkpoints),
            ]
        )

        start_iter = checkpointer.resume() if resume else 0  # restores the hooks' states as well
        if start_iter == 0:
            _initialise(model, cfg, classes)
        if start_iter >= max_iter:
            logger.info("%s is finished: %d iterations", train.output_dir, start_iter)
        with (
            stop.listen(finished=lambda: trainer.iter >= max_iter),
            _system_failures_explained(checkpointer),
        ):
            if resume:
                on_main_process(lambda: save_config(cfg))
            trainer.train(start_iter, max_iter)
        stop.close()
        if evaluation is not None and evaluation.error:
            error = evaluation.error
            lost = DEAD_WORKER.search(error) and "shared memory" not in error
            raise (ProcessKilled if lost else UserError)(
                f"the final evaluation failed: {error}. The trained model is "
                f"{checkpointer.last_good()}; evaluate it again with region-pretrain finetune "
                f"--config-file {os.path.join(train.output_dir, 'config.yaml')} --eval-only "
                f"train.init_checkpoint={checkpointer.last_good()}"
            )
        return newest_metrics(train.output_dir), evaluation.results if evaluation else {}


def check_start(
    cfg: DictConfig, data: TrainingData, build: Callable[[DictConfig, torch.device], nn.Module]
) -> None:
    """Find what :func:`run_training` would refuse before its first step, without its folder.

    Nothing is logged, since the run itself logs it again.

    Args:
        cfg: complete; not changed.
        data: only its batch size and its iterations per epoch are used.
        build: (config, device) -> the model; it is discarded.

    Raises:
        UserError: the device, the schedule, the model, its optimiser or the initial weights.
    """
    cfg = copy.deepcopy(cfg)
    cfg.train.seed = cfg.train.seed or 0
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with random_state_kept():
            device = resolve_device(cfg.train.device)
            use_fast_kernels(cfg.train, device)
            amp_dtype(cfg.train.amp, device)
            check_batch_size(cfg, data)
            max_iter = resolve_max_iter(cfg.train, data.iterations_per_epoch)
            model = build(cfg, device)
            _optimisation(cfg, data, model, max_iter, scale_lr(cfg, data, max_iter))
            _initialise(model, cfg, None)
    finally:
        logging.disable(disabled)


def _optimisation(
    cfg: DictConfig, data: TrainingData, model: nn.Module, max_iter: int, lr: float
) -> tuple[torch.optim.Optimizer, ParamScheduler]:
    """The optimiser of what ``train.freeze`` leaves to train, and the learning rate's schedule."""
    freeze(model, cfg.train.freeze)
    warn_of_single_images(cfg, data, model)
    warn_of_long_queues(data, model)
    warn_of_few_steps(data, max_iter)
    optimizer = build_optimizer(cfg, model, lr)
    multiplier = check_schedule(build_part(cfg.lr_multiplier, "lr_multiplier"))
    log_schedule(cfg, multiplier, max_iter)
    return optimizer, multiplier


def _own_hooks(train: DictConfig) -> list[HookBase]:
    built = build_part(train.hooks, "train.hooks")
    for i, hook in enumerate(built):
        if not isinstance(hook, HookBase | None):
            raise UserError(
                f"train.hooks.{i}={hook} is not a hook: write L(MyHook)(period=3), or in an "
                "override {_target_: package.MyHook, period: 3}"
            )
    return built


@contextmanager
def _system_failures_explained(checkpointer: RunCheckpointer) -> Iterator[None]:
    """Let a full disk, and a loader's worker that was killed, end the run with one line.

    Raises:
        UserError: the disk or the shared memory is full.
        ProcessKilled: a worker was killed.
    """
    report = threading.excepthook
    # TensorBoard's thread raises its error again in this one.
    threading.excepthook = lambda args: None if is_disk_full(args.exc_value) else report(args)
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"no space left in {checkpointer.save_dir}; last good checkpoint: "
            f"{checkpointer.last_good() or 'none'}. Free some disk space and continue with --resume"
        ) from error
    except RuntimeError as error:  # PyTorch's texts; a signal handler may raise it anywhere
        text = " ".join(str(error).split())
        if isinstance(error, dist.DistError):  # NCCL has shared memory as well
            raise
        if "shared memory" in text:
            raise UserError(
                "the loader's workers ran out of shared memory: " + MORE_SHARED_MEMORY.format(8)
            ) from None
        if not DEAD_WORKER.search(text):
            raise
        raise ProcessKilled(
            f"{text.rstrip('.')}, perhaps because memory ran out: continue with --resume, if "
            "necessary with a lower dataloader.train.num_workers; last good checkpoint: "
            f"{checkpointer.last_good() or 'none'}"
        ) from None
    finally:
        threading.excepthook = report


def _initialise(model: nn.Module, cfg: DictConfig, classes: Classes | None) -> None:
    """Load ``train.init_checkpoint``, if any, and look for layers that would stay random."""
    path = cfg.train.init_checkpoint
    if not path:
        logger.info("no train.init_checkpoint: all weights are random")
        check_trainable(cfg, model)
        if isinstance(model, PretrainingModel) and facts_of(model).pixel_std == (1.0, 1.0, 1.0):
            logger.warning(
                "pixels are not normalised: their std is [1, 1, 1], as Caffe2's ImageNet weights "
                "need it. For random weights, set model.pixel_std=[57.375,57.12,58.395] (yacs: "
                "MODEL.PIXEL_STD), in pre-training and fine-tuning"
            )
        return
    report = load_pretrained(model, path, partial=cfg.train.init_partial)
    if classes:
        compare_with_checkpoint(report, classes, training=True)
    check_trainable(cfg, model, report.matched)
    if isinstance(model, PretrainingModel):
        renew_momentum_copies(model)
