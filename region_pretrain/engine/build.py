"""Builds the parts of a run from its config."""

from __future__ import annotations

import copy
import logging
import os
import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from detectron2.config import instantiate
from detectron2.engine import create_ddp_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from fvcore.common.param_scheduler import ParamScheduler
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import distributed as dist
from torch import nn

from region_pretrain.engine.kernels import emulates_bfloat16
from region_pretrain.engine.trainable import check_groups
from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import VectorNorm
from region_pretrain.modeling.meta_arch import PretrainingModel, check_contract
from region_pretrain.modeling.norm_keys import norm_errors
from region_pretrain.modeling.norms import use_sync_batchnorm
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import compile_trunks, use_plain_checkpoints
from region_pretrain.solver.schedules import timeline

logger = logging.getLogger(__name__)

_AMP_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}
#: A shorter warm-up of a fine-tuning, in iterations, is probably not meant.
_WARMUP = 100


#: How the message of a TypeError begins -> what to do. A name that the pattern captures must be one
#: of the config: other errors of this kind are in the code that it calls.
_MENDS = {
    r"\S+\(\) got an unexpected keyword argument '(\w+)'": "remove it from the config or the "
    "overrides, or with ~KEY",
    r"(?:\S*?\.)??(\w+?)(?:\.__init__)?\(\) missing \d+ required": "add it to the config or the "
    "overrides, as +KEY=VALUE",
    "Can't instantiate abstract class": "implement what is missing",
}


@runtime_checkable
class TrainingData(Protocol):
    """What the engine expects of a training loader.

    Attributes:
        total_batch_size: images per iteration, summed over all processes.
        iterations_per_epoch: full batches per epoch; None if the data has no epochs.

    An optional method ``prefetched_bytes()`` returns the shared memory that this process's batches
    occupy at most; see :func:`region_pretrain.engine.memory.check_shared_memory`. Another one,
    ``contents()``, returns what the batches are computed from; without it, a resumed run cannot
    notice that the images have changed (:class:`region_pretrain.engine.fingerprint.Fingerprint`).
    A third one, ``first_images(iteration, count)``, returns part of a batch for pictures.
    Data that depends on the model has ``refresh_period``: the iterations after which it changes,
    with a checkpoint saved before each change.
    """

    total_batch_size: int
    iterations_per_epoch: int | None

    def iterate(self, start_iter: int, stop_iter: int) -> Iterable[Any]:
        """This process's batches of iterations ``start_iter`` to ``stop_iter - 1``, in order."""


def resolve_device(name: str | None) -> torch.device:
    """``train.device`` as a device; null means a CUDA GPU if there is one, else the CPU.

    Raises:
        UserError: neither ``cuda``, ``mps`` nor ``cpu``; ``mps``, and there is no Apple GPU; or
            SLURM gave the job GPUs that PyTorch cannot use.
    """
    if name not in (None, "cuda", "mps", "cpu"):
        raise UserError(
            f"train.device={name}: must be cuda, mps, cpu or null (CUDA_VISIBLE_DEVICES=N chooses "
            "a GPU)"
        )
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise UserError("train.device=mps: PyTorch finds no Apple GPU; set train.device=cpu")
        if comm.get_world_size() > 1:
            raise UserError("train.device=mps: an Apple GPU trains in one process; use one only")
        return torch.device("mps")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    given = os.environ.get("SLURM_JOB_GPUS") or os.environ.get("SLURM_STEP_GPUS")
    if name != "cpu" and given:
        raise UserError(
            f"SLURM gave this job GPUs ({given}), but PyTorch finds none on "
            f"{socket.gethostname()}: submit it with --slurm exclude=NODE if the node is damaged, "
            "or set train.device=cpu"
        )
    if name == "cuda":
        logger.warning("train.device=cuda, but this machine has no CUDA GPU: using the CPU")
    return torch.device("cpu")


def resolve_max_iter(train: DictConfig, iterations_per_epoch: int | None) -> int:
    """``train.max_iter``, or ``train.epochs`` in iterations.

    Raises:
        UserError: neither is set, or the result is less than one iteration.
    """
    if train.max_iter is not None:
        max_iter = int(train.max_iter)
    elif train.epochs is None:
        raise UserError("set the length of training: train.epochs or train.max_iter")
    elif not iterations_per_epoch:
        raise UserError(
            f"train.epochs={train.epochs}, but an epoch has no full batch: the data set is empty, "
            "smaller than dataloader.train.total_batch_size, or endless (then set train.max_iter)"
        )
    else:
        max_iter = int(train.epochs * iterations_per_epoch)
        if max_iter < 1:
            raise UserError(
                f"train.epochs={train.epochs}, of {iterations_per_epoch} iterations each: there is "
                "nothing to train"
            )
    if max_iter < 1:
        raise UserError(f"train.max_iter={max_iter}: there is nothing to train")
    if train.log_period < 1 or train.accumulate_steps < 1:
        raise UserError(
            f"train.log_period={train.log_period} and train.accumulate_steps="
            f"{train.accumulate_steps} must be at least 1"
        )
    return max_iter


def scale_lr(cfg: DictConfig, data: TrainingData, max_iter: int) -> float:
    """Scale ``optimizer.lr`` linearly with the batch size; log it and the length of the run.

    Returns:
        ``optimizer.lr * total_batch_size / train.base_batch_size``; unscaled if that key is null.
    """
    lr, base = cfg.optimizer.lr, cfg.train.base_batch_size
    text = f"lr {lr:g}"
    if base is not None:
        text = f"lr {lr:g} * {data.total_batch_size} / {base} = "
        lr = lr * data.total_batch_size / base
        text += f"{lr:g}"
    if cfg.train.max_iter is None:
        text += (
            f", {cfg.train.epochs:g} epochs * {data.iterations_per_epoch} = {max_iter} iterations "
            f"of {data.total_batch_size} images"
        )
    else:
        text += f", {max_iter} iterations of {data.total_batch_size} images"
        if data.iterations_per_epoch:
            text += f" = {max_iter / data.iterations_per_epoch:.4g} epochs"
        if base not in (None, data.total_batch_size) and cfg.train.epochs is None:
            same = round(max_iter * base / data.total_batch_size)
            text += f"; as many images as at batch size {base}: train.max_iter={same}"
    logger.info("%s", text)
    of_yacs = OmegaConf.select(cfg, "model.cfg.SOLVER.IMS_PER_BATCH")
    if base is None and of_yacs not in (None, data.total_batch_size):
        logger.warning(
            "SOLVER.BASE_LR of a yacs config is not scaled with the batch size: for %d images "
            "instead of %d, optimizer.lr=%g would be in proportion",
            *(data.total_batch_size, of_yacs, lr * data.total_batch_size / of_yacs),
        )
    return lr


def log_schedule(cfg: DictConfig, multiplier: ParamScheduler, max_iter: int) -> None:
    """Log where the learning rate changes; warn if a short run leaves hardly any warm-up.

    Schedules are scaled to the length of the run. Steps that look like iterations of the run
    itself, but are scaled, cause a warning, too.
    """
    at, lazy = timeline(multiplier, max_iter), cfg.lr_multiplier
    texts = [f"warm-up until iteration {at.warmup}"] if at.warmup else []
    texts += [f"drops at {', '.join(map(str, at.drops))}"] if at.drops else []
    if texts:
        logger.info("learning rate: %s", "; ".join(texts))
    if at.planned is None or not _WARMUP < max_iter < at.planned:
        return
    least = min(_WARMUP, max_iter // 5)
    if at.warmup_length and at.warmup < least:
        longer = f"warmup_iters={round(least * at.planned / max_iter)}"
        if "warmup_length" in lazy:  # Detectron2's own
            longer = f"warmup_length={least / max_iter:.3g}"
        new = "" if longer.partition("=")[0] in lazy else "+"
        logger.warning(
            "the warm-up of %d of %d iterations has become one of %d of %d: "
            "%slr_multiplier.%s makes it %d",
            *(round(at.warmup_length * at.planned), at.planned, at.warmup, max_iter),
            *(new, longer, least),
        )
    if "steps" in lazy and at.steps and at.steps[-1] < max_iter < 0.9 * at.planned:
        logger.warning(
            "lr_multiplier.steps=%s are iterations of a run of lr_multiplier.max_iter=%d: this run "
            "of %d has its drops at %s; if its own iterations are meant, set "
            "lr_multiplier.max_iter=%d",
            *(at.steps, at.planned, max_iter, at.drops, max_iter),
        )


def check_batch_size(cfg: DictConfig, data: TrainingData) -> None:
    """Check that the processes can share a batch equally and split their part as configured.

    Raises:
        UserError: they cannot.
    """
    world, total = comm.get_world_size(), data.total_batch_size
    if total % world or total // world < cfg.train.accumulate_steps:
        raise UserError(
            f"dataloader.train.total_batch_size={total} must be a multiple of the {world} "
            f"processes, with at least train.accumulate_steps={cfg.train.accumulate_steps} "
            "images for each"
        )


def warn_of_single_images(cfg: DictConfig, data: TrainingData, model: nn.Module) -> None:
    """Warn if a batch norm over vectors may receive only those of one image at a time."""
    world, parts = comm.get_world_size(), cfg.train.accumulate_steps
    vector_norms = [m for m in model.modules() if isinstance(m, VectorNorm)]
    if data.total_batch_size // world // parts == 1 and any(m.is_local() for m in vector_norms):
        logger.warning(
            "%s: a batch norm that receives a single vector uses its running statistics, which "
            "then never change",
            one_image_at_a_time(data.total_batch_size, parts),
        )


def warn_of_long_queues(data: TrainingData, model: nn.Module) -> None:
    """Warn if a queue of images' keys is longer than the data set."""
    images = (data.iterations_per_epoch or 0) * data.total_batch_size
    for name, module in model.named_modules():
        if isinstance(module, KeyQueue) and module.of_images and 0 < images < len(module):
            logger.warning(
                "model.%s.length=%d is more than the %d images of an epoch: other views of an "
                "image are among its own negatives; lower it, e.g. to half of them (%d)",
                *(name, len(module), images, max(1, images // 2)),
            )


#: Fewer steps are named, if smaller batches would give more of them.
_FEW_STEPS, _SMALL_BATCH = 5000, 256


def warn_of_few_steps(data: TrainingData, max_iter: int) -> None:
    """Warn if the batch size of a recipe for large data leaves few steps on a small data set."""
    if data.iterations_per_epoch and max_iter < _FEW_STEPS and data.total_batch_size > _SMALL_BATCH:
        images = data.iterations_per_epoch * data.total_batch_size
        logger.warning(
            "%d steps of %d images are few: the recipes have tens of thousands. For the %d images "
            "of an epoch, lower dataloader.train.total_batch_size, e.g. to %d, and raise "
            "train.epochs",
            *(max_iter, data.total_batch_size, images, _SMALL_BATCH),
        )


def one_image_at_a_time(total_batch_size: int, accumulate_steps: int) -> str:
    """What a message says about a run whose processes train on one image at a time."""
    return (
        "each process trains on one image at a time (dataloader.train.total_batch_size="
        f"{total_batch_size}, {comm.get_world_size()} processes, train.accumulate_steps="
        f"{accumulate_steps}), too few for batch norm: raise the batch size, lower "
        "accumulate_steps, or use SyncBN with several processes"
    )


def build_part(lazy: Any, key: str) -> Any:
    """Instantiate a part of a config whose classes may be the user's.

    Args:
        lazy: the lazy object, or a list of them.
        key: its place in the config, e.g. ``dataloader.train``, for the error message.

    Raises:
        UserError: a class lacks methods that its base class requires; or a class or function has no
            argument that the config gives, or needs one that it does not give; or a norm is wrong.
    """
    try:
        with norm_errors(lazy):
            return instantiate(lazy)
    except TypeError as error:
        for pattern, mend in _MENDS.items():
            found = re.match(pattern, str(error))
            if found and set(found.groups()) <= set(_names(lazy)):
                raise UserError(f"{key}: {error}: {mend}") from error
        raise


def _names(lazy: Any) -> Iterator[str]:
    """The arguments of lazy objects, and the names of their classes and functions."""
    if OmegaConf.is_config(lazy):
        lazy = OmegaConf.to_container(lazy, resolve=False)
    for key, value in lazy.items() if isinstance(lazy, dict) else ():
        yield key
        if key == "_target_":
            yield str(getattr(value, "__name__", value)).rpartition(".")[2]
    if isinstance(lazy, dict | list):
        for value in lazy.values() if isinstance(lazy, dict) else lazy:
            yield from _names(value)


def build_model(cfg: DictConfig, device: torch.device) -> nn.Module:
    """Instantiate ``cfg.model`` on a device, with the same weights in every process."""
    seed_all_rng(cfg.train.seed)
    model = build_part(cfg.model, "model").to(device)
    use_plain_checkpoints(model)
    seed_all_rng(cfg.train.seed + comm.get_rank())
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    if dist.is_available() and dist.is_initialized():
        use_sync_batchnorm(model)
    return model


def build_pretraining_model(cfg: DictConfig, device: torch.device) -> PretrainingModel:
    """:func:`build_model` for a pre-training config.

    Raises:
        UserError: ``cfg.model`` builds something that cannot be pre-trained.
    """
    return check_contract(build_model(cfg, device))


def wrap_model(cfg: DictConfig, model: nn.Module, device: torch.device) -> nn.Module:
    """Compile the trunks if configured; wrap the model in DDP if there are several processes."""
    if cfg.train.compile:
        compile_trunks(model)
    ddp = dict(cfg.train.ddp)
    # Not the local rank: a SLURM task may see only its own GPU, as number 0.
    ddp["device_ids"] = None if device.type == "cpu" else [device.index]
    return create_ddp_model(model, **ddp)


def build_optimizer(cfg: DictConfig, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """Instantiate ``cfg.optimizer`` over a model's parameters.

    Args:
        cfg: not changed; ``optimizer.params.model`` is filled in in a copy.
        model: not wrapped in DDP, which would prefix the parameters' names.
        lr: replaces ``cfg.optimizer.lr``. ``optimizer.params.base_lr``, which groups use instead
            of ``optimizer.lr``, is scaled likewise.

    Raises:
        UserError: ``optimizer.params`` leaves out trained parameters.
    """
    config = copy.deepcopy(cfg.optimizer)
    config.params.model = model
    base_lr = config.params.get("base_lr")
    if base_lr is not None and config.lr:  # "${optimizer.lr}" would still be that of cfg
        config.params.base_lr = lr if base_lr == config.lr else base_lr * lr / config.lr
    config.lr = lr
    optimizer = build_part(config, "optimizer")
    check_groups(cfg, model, optimizer)
    for group in [optimizer.defaults, *optimizer.param_groups]:
        for key, value in group.items():  # a ListConfig (betas) would not load with weights_only
            if isinstance(value, ListConfig | DictConfig):
                group[key] = OmegaConf.to_container(value, resolve=True)
    return optimizer


def amp_dtype(amp: Mapping[str, Any], device: torch.device) -> torch.dtype | None:
    """``train.amp`` as a dtype; None if it is off.

    Raises:
        UserError: the name is not that of a half-precision dtype.
    """
    if not amp["enabled"]:
        return None
    name = amp.get("dtype", "float16")
    if name not in _AMP_DTYPES:
        raise UserError(f"train.amp.dtype={name}: must be one of {', '.join(_AMP_DTYPES)}")
    if device.type != "cuda" and name == "float16":  # it needs a scaled loss
        logger.warning("train.amp.dtype=float16 needs a CUDA GPU: using bfloat16")
        name = "bfloat16"
    if name == "bfloat16" and emulates_bfloat16(device):
        logger.warning(
            "this CPU emulates bfloat16, several times slower than float32: set "
            "train.amp.enabled=false"
        )
    on_gpu = device.type == "cuda" and torch.cuda.is_available()
    if name == "bfloat16" and on_gpu and torch.cuda.get_device_capability() < (8, 0):
        logger.warning("this GPU emulates bfloat16 slowly: set train.amp.dtype=float16")
    return _AMP_DTYPES[name]


def clipping(clip: Mapping[str, Any]) -> dict[str, float]:
    """``train.clip_grad`` as keyword arguments of the trainer."""
    if not clip["enabled"]:
        return {}
    if clip["max_value"] is not None:
        return {"max_value": clip["max_value"]}
    return {"max_norm": clip["max_norm"]}
