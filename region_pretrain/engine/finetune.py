"""Fine-tunes and evaluates a detector from a Detectron2 LazyConfig."""

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
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.engine.build import TrainingData, build_model, resolve_device
from region_pretrain.engine.detection_data import detection_training_data
from region_pretrain.engine.output_dir import start_logging
from region_pretrain.engine.run import run_training, start_run
from region_pretrain.engine.trainer import Trainer
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.metrics import Results

logger = logging.getLogger(__name__)


def do_test(cfg: DictConfig, model: nn.Module) -> Results:
    """Evaluate a detector on the test set.

    Args:
        cfg: an object with the following fields:

            - ``dataloader.test``: lazy test loader.
            - ``dataloader.evaluator``: lazy ``DatasetEvaluator``; without it nothing is evaluated.
        model: the detector, not wrapped in DDP; its train/eval mode does not change.

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


def _check_data(cfg: DictConfig) -> list[str]:
    """Check the config's data sets before anything is computed.

    Returns:
        See :func:`region_pretrain.data.inspection.prepare_labels`.

    Raises:
        UserError: the config is for pre-training, or names an unknown or unlabelled data set.
    """
    if "evaluator" not in cfg.dataloader and "test" not in cfg.dataloader:
        raise UserError(
            "the config has no dataloader.test, so it is not a detection config "
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
                    "fine-tuning needs a registered data set with annotations"
                )
            check_registered(name)
    with _missing_files_are_user_errors():
        return prepare_labels(cfg)


@contextmanager
def _missing_files_are_user_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the data set cannot be read: {error}; built-in data sets are expected in the folder "
            "that the environment variable DETECTRON2_DATASETS names"
        ) from error


def do_evaluate(cfg: DictConfig) -> Results:
    """Evaluate ``train.init_checkpoint`` without training; write ``results_eval.json``.

    Args:
        cfg: see :func:`do_train`; ``optimizer`` and ``lr_multiplier`` are not used.

    Returns:
        See :func:`do_test`.

    Raises:
        UserError: there is no checkpoint, or it is not that of a trained detector.
    """
    complete_train(cfg)
    start_logging(None)
    for line in _check_data(cfg):
        logger.info(line)
    if not cfg.train.init_checkpoint:
        raise UserError("no weights to evaluate: set train.init_checkpoint=PATH")
    if cfg.train.seed is None:
        cfg.train.seed = 0
    model = build_model(cfg, resolve_device(cfg.train.device)).eval()
    report = load_pretrained(model, cfg.train.init_checkpoint)
    unfilled = [name for name, count in report.modules.items() if not count.loaded_tensors]
    if unfilled:
        raise UserError(
            f"{cfg.train.init_checkpoint} has no weights for {', '.join(unfilled)}: it is not a "
            "trained detector; fine-tune from it first, without --eval-only"
        )
    with _missing_files_are_user_errors():
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
            - ``train``: the keys of ``configs/common/train.py``; missing keys take their defaults
              from that file.
        resume: continue the run in ``train.output_dir``, with the same config.

    Returns:
        task -> metric -> value at the end of training (also in ``results.json``), on the main
        process.

    Raises:
        UserError: the config, the data or the output folder is invalid.
        FloatingPointError: a loss became NaN or infinite.
    """
    complete_train(cfg)
    labels = _check_data(cfg)
    start_run(cfg, resume)
    for line in labels:
        logger.info(line)
    with _missing_files_are_user_errors():
        data = detection_training_data(cfg.dataloader.train, cfg.train.seed)
        if "test" in cfg.dataloader:
            instantiate(cfg.dataloader.test)  # finds missing files now, not after training
    evaluated: list[Results] = []

    def make_hooks(trainer: Trainer) -> list[HookBase]:
        def evaluate() -> Results:
            evaluated.append(do_test(cfg, trainer.module))
            return evaluated[-1]

        evaluation = _EvalHook(cfg.train.eval_period, evaluate)
        if not cfg.train.precise_bn.enabled:
            return [evaluation]
        return [_precise_bn(cfg, trainer, data), evaluation]

    model, _ = run_training(cfg, data, resume=resume, make_hooks=make_hooks)
    # A run that was killed after its last checkpoint still has to be evaluated.
    results = evaluated[-1] if evaluated else do_test(cfg, model)
    if comm.is_main_process():
        _write_results(os.path.join(cfg.train.output_dir, "results.json"), results)
    return results


class _NextBatches:
    """Iterates over the batches that follow the trainer's current iteration."""

    def __init__(self, trainer: Trainer, data: TrainingData, count: int) -> None:
        self._trainer = trainer
        self._data = data
        self._count = count

    def __iter__(self) -> Iterator[Any]:
        start = self._trainer.iter + 1
        return iter(self._data.iterate(start, start + self._count))


class _EvalHook(hooks.EvalHook):
    """Skips the final evaluation, for which all processes would wait, if the last step failed."""

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            super().after_train()


class _PreciseBN(hooks.PreciseBN):
    """Restarts its iterator on each update, so that a resumed run sees the same batches."""

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
        }  # JSON has no NaN (the AP of a class without boxes)
        text = json.dumps(table, indent=2)
        write_text_atomic(path, text + "\n")
        logger.info("results: %s", path)
