"""A run's output folder: one run per folder, its config on disk, its console log."""

from __future__ import annotations

import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TextIO

from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import _cached_log_stream, setup_logger
from omegaconf import DictConfig

from region_pretrain.config import changed_keys, read_saved, saved_train_defaults, to_yaml
from region_pretrain.engine.fingerprint import HARMLESS_OF_LOADERS
from region_pretrain.errors import DEAD_WORKER, UserError, first_few
from region_pretrain.files import write_text_atomic
from region_pretrain.lazy import load_plain_yaml
from region_pretrain.modeling.given import without_numbers

logger = logging.getLogger(__name__)

#: Keys that may differ when a run is resumed, because they do not change what is computed.
HARMLESS = (
    "train.output_dir",
    "train.log_period",
    "train.checkpointer",
    "train.checkpoint_minutes",
    "train.checkpoint_keep_every",
    "train.allow_world_size_change",
    "train.allow_new_length",
    "train.allow_changed_data",
    "train.eval_period",
    "train.device",
    "train.register",
    "train.compile",
    "train.channels_last",
    "train.cudnn_benchmark",
    "train.float32_matmul_precision",
    "train.writers",
    "train.tracking",
    "train.pictures",
    "train.max_unreadable",
)
#: Hooks that may be added, changed or removed when a run is resumed, because they only observe it.
OBSERVERS = ("region_pretrain.evaluation.knn_probe.KNNProbeHook",)
#: Parts of a converted yacs config that other keys represent.
_ELSEWHERE = tuple(
    f"model.cfg.{key}"
    for key in (
        *("SOLVER", "DATASETS", "DATALOADER", "OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "VERSION"),
        *("INPUT", "TEST.EVAL_PERIOD", "TEST.PRECISE_BN", "MODEL.DEVICE", "MODEL.WEIGHTS"),
    )
)
#: Keys that may differ as well if train.allow_new_length is set and the length differs, or did.
LENGTH = ("train.epochs", "train.max_iter", "lr_multiplier", "optimizer.lr", "optimizer.base_lr")


def holds_run(folder: str) -> bool:
    """Whether a folder contains a run's first results: metrics or a checkpoint."""
    names = PathManager.ls(folder) if PathManager.isdir(folder) else []
    if any(name.startswith("model_") and name.endswith(".pth") for name in names):
        return True
    if "metrics.json" not in names:
        return False
    path = os.path.join(folder, "metrics.json")
    if not PathManager.isfile(path):
        return True
    with PathManager.open(path, "rb") as file:
        return bool(file.read(1))  # empty if the run ended in its first steps


def refuse_existing_run(folder: str) -> None:
    """Keep a new run from overwriting an existing one.

    Raises:
        UserError: the folder contains a run.
    """
    if holds_run(folder):
        raise UserError(
            f"{folder} already contains a run: continue it with --resume (resume=True in Python), "
            "or choose another train.output_dir"
        )


def claim_output_dir(cfg: DictConfig, resume: bool) -> int:
    """Write ``config.yaml`` to ``train.output_dir``. Only the main process calls this.

    If a run is continued, its ``config.yaml`` is replaced only after its checkpoint was read; see
    :func:`save_config`.

    Args:
        cfg: complete. A null ``train.seed`` is replaced: by the seed of the resumed run, or by a
            random one.
        resume: whether the run in the folder is to be continued.

    Returns:
        The seed.

    Raises:
        UserError: the folder contains a run and ``resume`` is off, or the config of that run
            differs in more than :data:`HARMLESS` keys.
        OSError: the config cannot be read or written.
    """
    folder = cfg.train.output_dir
    path = os.path.join(folder, "config.yaml")
    if not resume:
        refuse_existing_run(folder)
    saved = _saved_config(path) if holds_run(folder) else None
    if cfg.train.seed is None:
        drawn = int.from_bytes(os.urandom(3), "big")
        cfg.train.seed = drawn if saved is None else saved["train"].get("seed", drawn)
    if saved is None:
        save_config(cfg)
    else:
        _refuse_changes(path, saved, cfg)
    return cfg.train.seed


def save_config(cfg: DictConfig) -> None:
    """Write ``config.yaml`` to ``train.output_dir``."""
    write_text_atomic(os.path.join(cfg.train.output_dir, "config.yaml"), to_yaml(cfg))


def _saved_config(path: str) -> dict[str, Any] | None:
    """The config of the run to resume; None, with a warning, if it is missing."""
    if PathManager.exists(path):
        return read_saved(path)
    logger.warning(
        "%s is missing: nothing shows whether the run was started with this config, so make sure "
        "that learning rate, seed and data are the same",
        path,
    )
    return None


def _without_observers(config: dict[str, Any]) -> dict[str, Any]:
    """A config in its saved form without :data:`OBSERVERS`."""
    hooks = config["train"].get("hooks") or []
    kept = [h for h in hooks if not (isinstance(h, dict) and h.get("_target_") in OBSERVERS)]
    return {**config, "train": {**config["train"], "hooks": kept}}


def _is_in(key: str, groups: Sequence[str]) -> bool:
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def differing_settings(saved: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings of two runs that differ, apart from those that do not change what is computed.

    Args:
        saved: the config of a run, perhaps of an earlier version, from
            :func:`~region_pretrain.config.read_saved`.
        other: another config in its saved form.

    Returns:
        As :func:`~region_pretrain.config.changed_keys`.
    """
    # A run of an earlier version lacks keys that have been added since.
    saved = {**saved, "train": {**saved_train_defaults(), **saved["train"]}}
    changed = changed_keys(_without_observers(saved), _without_observers(other))
    return {
        key: values
        for key, values in changed.items()
        if key.rsplit(".", 1)[-1] not in HARMLESS_OF_LOADERS
        and not _is_in(key, HARMLESS + _ELSEWHERE)
        # A built detector, of which another one of these shapes exists, e.g. in a traceback.
        and not (key.endswith(".detector") and len({without_numbers(v[1:-1]) for v in values}) == 1)
    }


def _refuse_changes(path: str, saved: dict[str, Any], cfg: DictConfig) -> None:
    changed = differing_settings(saved, load_plain_yaml(to_yaml(cfg)))
    longer = not changed.keys().isdisjoint(("train.epochs", "train.max_iter"))
    if cfg.train.allow_new_length and (longer or saved["train"]["allow_new_length"]):
        changed = {key: both for key, both in changed.items() if not _is_in(key, LENGTH)}
    if changed:
        shown = first_few([f"{key}: {a} -> {b}" for key, (a, b) in changed.items()], 10, "; ")
        longer &= all(_is_in(key, LENGTH) for key in changed)
        hint = ", set train.allow_new_length=True to make the run longer," if longer else ""
        raise UserError(
            f"cannot resume with a config that differs from {path}: {shown}. "
            f"Undo the change{hint} or choose another train.output_dir"
        )


_LOGGERS = ("fvcore", "detectron2", "region_pretrain")
_log_handlers: list[tuple[logging.Logger, logging.Handler]] = []
_log_files: list[TextIO] = []
_console_filters: list[Callable[[logging.LogRecord], bool]] = []


@contextmanager
def logging_kept(console: Callable[[logging.LogRecord], bool]) -> Iterator[None]:
    """Restore the loggers that :func:`start_logging` changes after the context.

    Args:
        console: which records the console shows within the context.
    """
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [(log, log.level, log.propagate, list(log.handlers)) for log in loggers]
    kept = list(_log_handlers), list(_log_files)
    _log_files.clear()  # those of handlers that are restored stay open
    _console_filters.append(console)
    try:
        yield
    finally:
        _console_filters.remove(console)
        _close_logs()
        _log_handlers[:], _log_files[:] = kept
        setup_logger.cache_clear()
        for log, level, propagate, handlers in before:
            log.setLevel(level)
            log.propagate, log.handlers = propagate, handlers


def start_logging(folder: str | None) -> None:
    """Log to the console (main process) and to ``<folder>/log.txt`` (others: ``log.txt.rankN``).

    A second run in the same process logs to its own folder only.

    Raises:
        UserError: ``log.txt`` cannot be opened.
    """
    for log, handler in _log_handlers:
        log.removeHandler(handler)
    _log_handlers.clear()
    _close_logs()
    # Otherwise a folder of an earlier run would get no handler, or the log.txt that was there then.
    setup_logger.cache_clear()
    _cached_log_stream.cache_clear()
    for name in _LOGGERS:
        log = logging.getLogger(name)
        before = list(log.handlers)
        try:
            setup_logger(folder, distributed_rank=comm.get_rank(), name=name, abbrev_name=name)
        except OSError as error:
            raise UserError(f"cannot write {folder}/log.txt: {error}") from error
        new = [h for h in log.handlers if h not in before]
        _log_handlers.extend((log, h) for h in new)
        for handler in new:
            handle = handler.handleError
            if handler.stream is sys.stdout:
                handler.setLevel(logging.INFO)
                for accepts in (_is_not_traceback, *_console_filters):
                    handler.addFilter(accepts)
            else:
                _log_files.append(handler.stream)
                handle = functools.partial(_stop_writing, handler.stream)
            handler.handleError = functools.partial(_handle_error, handle)


def _close_logs() -> None:
    while _log_files:
        _log_files.pop().close()


def _is_not_traceback(record: logging.LogRecord) -> bool:
    """False for the traceback with which Detectron2's trainer ends; it is only in ``log.txt``."""
    # Detectron2's formatter of another handler may have abbreviated the name.
    return not (record.exc_info and record.name.endswith(".engine.train_loop"))


def _handle_error(handle: Callable[[logging.LogRecord], None], record: logging.LogRecord) -> None:
    """Pass on the error of a loader's worker, which PyTorch's signal handler raises anywhere."""
    error = sys.exc_info()[1]
    if isinstance(error, RuntimeError) and DEAD_WORKER.search(str(error)):
        raise error
    handle(record)


def _stop_writing(stream: TextIO, record: logging.LogRecord) -> None:
    """Continue without ``log.txt`` after it could not be written, e.g. to a full disk."""
    print(f"{stream.name} cannot be written ({sys.exc_info()[1]}); it ends here", file=sys.stderr)
    with open(os.devnull, "wb") as nowhere:  # also for what is still in the stream's buffer
        os.dup2(nowhere.fileno(), stream.fileno())
