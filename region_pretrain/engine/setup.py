"""The start of a run: its folder, its config on disk, its log, its seed."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.env import seed_all_rng
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig

from region_pretrain.config import changed_keys, config_text, load_saved, load_text
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic

logger = logging.getLogger(__name__)

#: Keys that may differ when a run is resumed: they do not change what is computed.
HARMLESS = (
    "train.output_dir",
    "train.log_period",
    "train.checkpointer",
    "train.allow_world_size_change",
    "train.eval_period",
    "train.device",
    "train.compile",
    "train.channels_last",
    "train.cudnn_benchmark",
)
_HARMLESS_LAST = ("num_workers",)


def resolve_device(name: str | None) -> torch.device:
    """``train.device`` as a device: null is a GPU where there is one, else the CPU.

    Raises:
        UserError: neither ``cuda`` nor ``cpu``.
    """
    if name not in (None, "cuda", "cpu"):
        raise UserError(f"train.device={name}: must be cuda, cpu or null")
    if name != "cpu" and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    if name == "cuda":
        logger.warning("train.device=cuda, but there is no GPU here: using the CPU")
    return torch.device("cpu")


def start_run(cfg: DictConfig, resume: bool) -> None:
    """Claim ``train.output_dir``, start logging to it, save the config there, seed this process.

    Every process of a run calls it.

    Args:
        cfg: completed with :func:`complete_train`; ``train.seed`` is drawn here where it is null.
        resume: continue the run that the folder holds.

    Raises:
        UserError: the folder holds a run and ``resume`` is off, or that run's config differs in
            more than :data:`HARMLESS` keys, or the config cannot be saved.
    """
    outcome = None
    if comm.is_main_process():
        try:
            outcome = _claim(cfg, resume)
        except UserError as error:
            outcome = error
    outcome = comm.all_gather(outcome)[0]
    if isinstance(outcome, UserError):
        raise outcome
    cfg.train.seed = outcome
    seed_all_rng(cfg.train.seed + comm.get_rank())
    torch.backends.cudnn.benchmark = cfg.train.cudnn_benchmark
    folder = cfg.train.output_dir
    start_logging(folder)
    logger.info("rank %d of %d processes", comm.get_rank(), comm.get_world_size())
    environment = collect_env_info().split("PyTorch built with")[
        0
    ]  # compiler flags: 3000 characters
    logger.info("environment:\n%s", environment)
    logger.info("config: %s", os.path.join(folder, "config.yaml"))


_log_handlers: list[tuple[logging.Logger, logging.Handler]] = []


def start_logging(folder: str | None) -> None:
    """Log to the console (main process) and to ``<folder>/log.txt`` (``.rankN`` on the others).

    A second run in the same process logs to its own folder only.
    """
    for log, handler in _log_handlers:
        log.removeHandler(handler)
    _log_handlers.clear()
    setup_logger.cache_clear()  # else a folder seen before would get no handler
    for name in ("fvcore", "detectron2", "region_pretrain"):
        log = logging.getLogger(name)
        before = list(log.handlers)
        setup_logger(folder, distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
        _log_handlers.extend((log, h) for h in log.handlers if h not in before)


def _claim(cfg: DictConfig, resume: bool) -> int:
    """Check and write ``config.yaml``; returns the seed."""
    folder = cfg.train.output_dir
    path = os.path.join(folder, "config.yaml")
    saved = None
    if not resume:
        refuse_held(folder)
    elif holds_run(folder):
        saved = load_saved(path)
    seed = cfg.train.seed
    if seed is None:
        seed = saved["train"]["seed"] if saved else int.from_bytes(os.urandom(3), "big")
    cfg.train.seed = seed
    text = config_text(cfg)
    if saved is not None:
        _refuse_changes(path, saved, load_text(text))
    try:
        PathManager.mkdirs(folder)
        write_text_atomic(path, text)
    except OSError as error:
        raise UserError(f"train.output_dir={folder} cannot be written: {error}") from error
    return seed


def holds_run(folder: str) -> bool:
    """Whether a folder holds a run that has got anywhere: a config, and metrics or checkpoints."""
    if not PathManager.isfile(os.path.join(folder, "config.yaml")):
        return False
    names = PathManager.ls(folder)
    return "metrics.json" in names or any(
        name.startswith("model_") and name.endswith(".pth") for name in names
    )


def refuse_held(folder: str) -> None:
    """Stop a new run in a folder that holds one.

    Raises:
        UserError: it does.
    """
    if holds_run(folder):
        raise UserError(
            f"{folder} already holds a run: continue it with --resume, "
            "or take another train.output_dir"
        )


def _refuse_changes(path: str, old: dict[str, Any], new: dict[str, Any]) -> None:
    changed = {
        key: values
        for key, values in changed_keys(old, new).items()
        if key.rsplit(".", 1)[-1] not in _HARMLESS_LAST
        and not any(key == k or key.startswith(f"{k}.") for k in HARMLESS)
    }
    if changed:
        shown = [f"{key}: {a} -> {b}" for key, (a, b) in list(changed.items())[:10]]
        more = f" and {len(changed) - 10} more" if len(changed) > 10 else ""
        raise UserError(
            f"cannot resume with another config than {path}: {'; '.join(shown)}{more}. "
            "Undo the change or take another train.output_dir"
        )
