"""Runs in a process that continues afterwards, such as a notebook's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from region_pretrain.data.sources import forget_labels
from region_pretrain.engine.kernels import backends_kept
from region_pretrain.engine.output_dir import logging_kept
from region_pretrain.engine.trainer import Trainer
from region_pretrain.errors import Stopped, UserError
from region_pretrain.random_state import random_state_kept
from region_pretrain.registration import catalogues_kept
from region_pretrain.warnings import library_warnings_ignored

#: Called after each step with the trainer, or a hook of Detectron2.
Callback = Callable[[Trainer], Any] | HookBase
#: Name of a data set -> its records and class names; see :mod:`region_pretrain.api.data`.
Given = Mapping[str, tuple[Sequence[dict], Sequence[str]]]

_PROGRESS = "region_pretrain.engine.writers"


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or a signal stopped a run, after its last step was saved."""


@contextmanager
def isolated(given: Given | None = None, verbose: bool = True) -> Iterator[None]:
    """Undo what a run changes in this process.

    These are the loggers of Detectron2, fvcore and this library, the random number generators,
    Detectron2's catalogues of data sets, cuDNN's benchmark mode and the precision of float32
    products.

    Args:
        given: data sets to register within the context.
        verbose: False shows only progress and warnings on the console.

    Raises:
        Interrupted: the run was stopped, and has saved a checkpoint.
    """

    def console(record: logging.LogRecord) -> bool:
        # The formatter of another handler may have abbreviated the name.
        is_progress = record.name.endswith(_PROGRESS.partition(".")[2])
        return verbose or is_progress or record.levelno >= logging.WARNING

    with ExitStack() as stack:
        stack.enter_context(library_warnings_ignored())
        stack.enter_context(random_state_kept())
        stack.enter_context(logging_kept(console))
        stack.enter_context(catalogues_kept())
        stack.enter_context(backends_kept())
        for name, (records, classes) in (given or {}).items():
            _register(name, records, classes)
        stack.callback(forget_labels)
        try:
            yield
        except Stopped:
            raise Interrupted(
                "stopped on request: the last step is saved, and the same call with resume=True "
                "continues the run"
            ) from None


def _register(name: str, records: Sequence[dict], classes: Sequence[str]) -> None:
    DatasetCatalog[name] = lambda: [dict(record) for record in records]
    if classes:
        MetadataCatalog.get(name).set(thing_classes=list(classes))


def hooks_of(callbacks: Callback | Sequence[Callback]) -> list[HookBase]:
    """Callbacks as hooks.

    Raises:
        UserError: one is neither a function nor a hook.
    """
    callbacks = list(callbacks) if isinstance(callbacks, Sequence) else [callbacks]
    for callback in callbacks:
        if isinstance(callback, type) or not (isinstance(callback, HookBase) or callable(callback)):
            raise UserError(f"callbacks: {callback!r} is neither a function nor a HookBase object")
    return [c if isinstance(c, HookBase) else _AfterStep(c) for c in callbacks]


class _AfterStep(HookBase):
    def __init__(self, function: Callable[[Trainer], Any]) -> None:
        self._function = function

    def after_step(self) -> None:
        self._function(self.trainer)


class KeepModel(HookBase):
    """Keeps the model of a run.

    Args:
        start: called before the first step.

    Attributes:
        model: the model, without DDP; None before the run.
    """

    def __init__(self, start: Callable[[], None] = lambda: None) -> None:
        self.model: torch.nn.Module | None = None
        self._start = start

    def before_train(self) -> None:
        self.model = self.trainer.module
        self._start()
