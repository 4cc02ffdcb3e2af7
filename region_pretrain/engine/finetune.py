"""Fine-tuning and evaluating a detector from a Detectron2 LazyConfig."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from math import isnan
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from region_pretrain.engine.detection_data import detection_training_data
from region_pretrain.engine.run import TrainingData, build_model, run_training
from region_pretrain.engine.setup import complete_train, resolve_device, start_logging, start_run
from region_pretrain.engine.trainer import Trainer
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic

logger = logging.getLogger(__name__)

Results = dict[str, dict[str, float]]


def do_test(cfg: DictConfig, model: nn.Module) -> Results:
    """Evaluate a detector on the test set.

    Args:
        cfg: an object with the following fields:

            - ``dataloader.test``: lazy test loader.
            - ``dataloader.evaluator``: lazy ``DatasetEvaluator``; without it nothing is evaluated.
        model: the detector, not in DDP; its mode is the same afterwards.

    Returns:
        task -> metric -> value, on the main process; empty on the others.
    """
    if "evaluator" not in cfg.dataloader:
        return {}
    results = inference_on_dataset(
        model, instantiate(cfg.dataloader.test), instantiate(cfg.dataloader.evaluator)
    )
    if not comm.is_main_process() or not results:
        return {}
    print_csv_format(results)
    return {task: dict(values) for task, values in results.items()}


def do_evaluate(cfg: DictConfig) -> Results:
    """Evaluate ``train.init_checkpoint`` without training; ``results.json`` gets the table.

    Args:
        cfg: as for :func:`do_train`; ``optimizer`` and ``lr_multiplier`` are not read.

    Returns:
        As :func:`do_test`.

    Raises:
        UserError: no checkpoint is named.
    """
    complete_train(cfg)
    start_logging(None)
    if not cfg.train.init_checkpoint:
        raise UserError("say which weights to evaluate: train.init_checkpoint=PATH")
    if cfg.train.seed is None:
        cfg.train.seed = 0
    model = build_model(cfg, resolve_device(cfg.train.device)).eval()
    load_pretrained(model, cfg.train.init_checkpoint)
    results = do_test(cfg, model)
    if comm.is_main_process():
        PathManager.mkdirs(cfg.train.output_dir)
        _write_results(cfg.train.output_dir, results)
    return results


def do_train(cfg: DictConfig, resume: bool = False) -> Results:
    """Fine-tune a detector and evaluate it.

    Args:
        cfg: an object with the following fields, as for Detectron2's ``lazyconfig_train_net.py``:

            - ``model``: lazy detector.
            - ``dataloader.train``: lazy training loader, see
              :func:`region_pretrain.engine.detection_data.detection_training_data`.
            - ``dataloader.test`` and ``dataloader.evaluator``: see :func:`do_test`.
            - ``optimizer``: lazy; ``params.model`` is filled in.
            - ``lr_multiplier``: lazy fvcore ``ParamScheduler``.
            - ``train``: the keys of ``configs/common/train.py``; what is left out takes its default
              from there.
        resume: continue the run in ``train.output_dir``, with the same config.

    Returns:
        task -> metric -> value at the end of training (also in ``results.json``), on the main
        process.

    Raises:
        UserError: the config, the data or the output folder does not fit.
        FloatingPointError: a loss became NaN or infinite.
    """
    complete_train(cfg)
    start_run(cfg, resume)
    data = detection_training_data(cfg.dataloader.train, cfg.train.seed)
    evaluated: list[Results] = []

    def make_hooks(trainer: Trainer) -> list[HookBase]:
        def evaluate() -> Results:
            if trainer.iter == trainer.max_iter - 1:
                return {}  # EvalHook comes here when the last step failed, too
            evaluated.append(do_test(cfg, trainer.module))
            return evaluated[-1]

        made: list[HookBase] = []
        if cfg.train.precise_bn.enabled:
            made.append(_precise_bn(cfg, trainer, data))
        return [*made, hooks.EvalHook(cfg.train.eval_period, evaluate)]

    model, _ = run_training(
        cfg, data, resume=resume, load_weights=load_pretrained, make_hooks=make_hooks
    )
    # A run that was killed after its last checkpoint has nothing left to do but this.
    results = evaluated[-1] if evaluated else do_test(cfg, model)
    if comm.is_main_process():
        _write_results(cfg.train.output_dir, results)
    return results


class _NextBatches:
    """The batches that come after the trainer's current iteration, each time it is iterated."""

    def __init__(self, trainer: Trainer, data: TrainingData, count: int) -> None:
        self._trainer = trainer
        self._data = data
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        start = self._trainer.iter + 1
        return iter(self._data.iterate(start, start + self._count))


class _PreciseBN(hooks.PreciseBN):
    """Takes its batches from the trainer's place in the data: a resumed run sees the same."""

    def update_stats(self) -> None:
        self._data_iter = None
        super().update_stats()
        self._data_iter = None


def _precise_bn(cfg: DictConfig, trainer: Trainer, data: TrainingData) -> HookBase:
    count = cfg.train.precise_bn.num_iter
    batches = _NextBatches(trainer, data, count)
    return _PreciseBN(cfg.train.eval_period, trainer.module, batches, count)


def _write_results(output_dir: str, results: Results) -> None:
    if results:
        table = {
            task: {name: None if isnan(value) else float(value) for name, value in values.items()}
            for task, values in results.items()
        }  # NaN (a class without boxes) is no JSON
        text = json.dumps(table, indent=2)
        write_text_atomic(os.path.join(output_dir, "results.json"), text + "\n")
