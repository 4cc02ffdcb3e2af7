"""Fine-tuning and evaluating a detector from a Detectron2 LazyConfig."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import isnan
from typing import Any

from detectron2.config import instantiate
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig
from torch import nn

from region_pretrain.config import complete_train
from region_pretrain.data.catalog import FOLDER_PREFIX, check_registered
from region_pretrain.engine.detection_data import detection_training_data
from region_pretrain.engine.run import TrainingData, build_model, run_training
from region_pretrain.engine.setup import resolve_device, start_logging, start_run
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


def _check_data(cfg: DictConfig) -> None:
    """Stop before anything is computed if the config's data cannot be had.

    Raises:
        UserError: a config for pre-training, an unknown data set, missing files.
    """
    if "evaluator" not in cfg.dataloader and "test" not in cfg.dataloader:
        raise UserError(
            "the config has no dataloader.test: it is no detection config "
            "(pre-training configs are for tools/pretrain_net.py)"
        )
    for split in ("train", "test"):
        loader = cfg.dataloader.get(split)
        dataset = loader.get("dataset") if loader is not None else None
        if dataset is None or "names" not in dataset:
            continue
        names = instantiate(dataset.names)
        for name in [names] if isinstance(names, str) else names:
            if name.startswith(FOLDER_PREFIX):
                raise UserError(
                    f"dataloader.{split}.dataset.names={name}: a folder has no boxes; "
                    "fine-tuning wants a registered data set with annotations"
                )
            check_registered(name)


@contextmanager
def _missing_files_told() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the data set cannot be read: {error}; built-in sets lie in the folder that the "
            "environment variable DETECTRON2_DATASETS names"
        ) from error


def do_evaluate(cfg: DictConfig) -> Results:
    """Evaluate ``train.init_checkpoint`` without training; ``results_eval.json`` gets the table.

    Args:
        cfg: as for :func:`do_train`; ``optimizer`` and ``lr_multiplier`` are not read.

    Returns:
        As :func:`do_test`.

    Raises:
        UserError: no checkpoint is named, or it is none of a trained detector.
    """
    complete_train(cfg)
    start_logging(None)
    _check_data(cfg)
    if not cfg.train.init_checkpoint:
        raise UserError("say which weights to evaluate: train.init_checkpoint=PATH")
    if cfg.train.seed is None:
        cfg.train.seed = 0
    model = build_model(cfg, resolve_device(cfg.train.device)).eval()
    report = load_pretrained(model, cfg.train.init_checkpoint)
    unfilled = [name for name, count in report.modules.items() if not count.loaded_tensors]
    if unfilled:
        raise UserError(
            f"{cfg.train.init_checkpoint} holds nothing for {', '.join(unfilled)}: it is no "
            "trained detector; fine-tune from it first, without --eval-only"
        )
    with _missing_files_told():
        results = do_test(cfg, model)
    if comm.is_main_process():
        PathManager.mkdirs(cfg.train.output_dir)
        _write_results(os.path.join(cfg.train.output_dir, "results_eval.json"), results)
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
    _check_data(cfg)
    start_run(cfg, resume)
    with _missing_files_told():
        data = detection_training_data(cfg.dataloader.train, cfg.train.seed)
        if "test" in cfg.dataloader:
            instantiate(cfg.dataloader.test)  # what is missing shows now, not after the training
    evaluated: list[Results] = []

    def make_hooks(trainer: Trainer) -> list[HookBase]:
        def evaluate() -> Results:
            evaluated.append(do_test(cfg, trainer.module))
            return evaluated[-1]

        made: list[HookBase] = []
        if cfg.train.precise_bn.enabled:
            made.append(_precise_bn(cfg, trainer, data))
        return [*made, _EvalHook(cfg.train.eval_period, evaluate)]

    model, _ = run_training(
        cfg, data, resume=resume, load_weights=load_pretrained, make_hooks=make_hooks
    )
    # A run that was killed after its last checkpoint has nothing left to do but this.
    results = evaluated[-1] if evaluated else do_test(cfg, model)
    if comm.is_main_process():
        _write_results(os.path.join(cfg.train.output_dir, "results.json"), results)
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


class _EvalHook(hooks.EvalHook):
    """Does not evaluate, and wait for the others, when the last step failed."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


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


def _write_results(path: str, results: Results) -> None:
    if results:
        table = {
            task: {name: None if isnan(value) else float(value) for name, value in values.items()}
            for task, values in results.items()
        }  # NaN (a class without boxes) is no JSON
        text = json.dumps(table, indent=2)
        write_text_atomic(path, text + "\n")
        logger.info("results: %s", path)
