"""Fine-tunes and evaluates a detector from a Detectron2 LazyConfig."""

from __future__ import annotations

import copy
import io
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from math import isnan
from typing import Any

import torch
from detectron2.engine import HookBase, hooks
from detectron2.evaluation import (
    DatasetEvaluator,
    DatasetEvaluators,
    inference_on_dataset,
    print_csv_format,
)
from detectron2.utils import comm
from fvcore.nn import precise_bn
from fvcore.nn.precise_bn import get_bn_modules
from omegaconf import DictConfig
from torch import Tensor, nn

from region_pretrain.config import complete_train
from region_pretrain.data.workers import share_batches_of
from region_pretrain.engine.build import (
    TrainingData,
    build_model,
    build_part,
    resolve_device,
)
from region_pretrain.engine.detection_data import build_test_loader, detection_training_data
from region_pretrain.engine.kernels import fast_kernels
from region_pretrain.engine.labelled_data import (
    Classes,
    check_labelled_data,
    compare_with_checkpoint,
    missing_files_are_user_errors,
)
from region_pretrain.engine.output_dir import start_logging
from region_pretrain.engine.processes import fail_together, on_main_process
from region_pretrain.engine.run import run_training, start_run
from region_pretrain.engine.trainer import Trainer
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import NonFiniteLoss, UserError
from region_pretrain.files import is_local, make_writable
from region_pretrain.json_files import write_json
from region_pretrain.metrics import DIVERGED, Results
from region_pretrain.modeling.given import detector_in, modes_kept
from region_pretrain.modeling.norms import broadcast_statistics
from region_pretrain.random_state import random_state_kept

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
    with fail_together():
        loader = build_test_loader(cfg.dataloader.test)
        evaluator = build_part(cfg.dataloader.evaluator, "dataloader.evaluator")
        share_batches_of(loader)
    with fail_together():
        broadcast_statistics(model)
        # A compiled trunk would be compiled for each shape, of which there is a limit.
        eager = torch.compiler.set_stance("force_eager")
        with _prints_logged(), modes_kept(model), eager:  # modes also of single layers
            results = inference_on_dataset(model, loader, _Together(evaluator))
        if not comm.is_main_process() or not results:
            return {}
        print_csv_format(results)
        return {
            task: {name: float(value) for name, value in values.items()}
            for task, values in results.items()
        }


@contextmanager
def _prints_logged() -> Iterator[None]:
    """Log what pycocotools prints, so that ``log.txt`` has it too."""
    text = io.StringIO()
    try:
        with redirect_stdout(text):
            yield
    finally:
        if printed := text.getvalue().strip():
            logger.info("%s", printed)


class _Together(DatasetEvaluators):
    """Evaluates once all processes have done their part of the inference without an error."""

    def __init__(self, evaluator: DatasetEvaluator | list[DatasetEvaluator]) -> None:
        super().__init__(list(evaluator) if isinstance(evaluator, Sequence) else [evaluator])

    def evaluate(self) -> Mapping[str, Any]:
        with fail_together():
            pass
        return super().evaluate()


def do_evaluate(cfg: DictConfig, model: nn.Module | None = None) -> Results:
    """Evaluate a detector without training; write ``results_eval.json``.

    Args:
        cfg: see :func:`do_train`; ``optimizer`` and ``lr_multiplier`` are not used.
        model: the detector, whose train/eval mode does not change; None builds ``cfg.model`` and
            loads ``train.init_checkpoint``.

    Returns:
        See :func:`do_test`.

    Raises:
        UserError: there is no checkpoint, or it is not that of a trained detector or of a detector
            of other classes; or ``train.output_dir`` cannot be written.
    """
    complete_train(cfg)
    start_logging(None)
    classes = check_labelled_data(cfg, training=False)
    classes.log()
    if model is None:
        model = _trained(cfg, classes)
    on_main_process(lambda: make_writable(cfg.train.output_dir, "train.output_dir"))
    device = next(model.parameters()).device
    with missing_files_are_user_errors(), fast_kernels(cfg.train, device):
        results = do_test(cfg, model)
    if comm.is_main_process():
        _write_results(os.path.join(cfg.train.output_dir, "results_eval.json"), results)
    return results


def _trained(cfg: DictConfig, classes: Classes) -> nn.Module:
    """The detector with the weights of ``train.init_checkpoint``, in eval mode."""
    if not cfg.train.init_checkpoint:
        raise UserError("no weights to evaluate: set train.init_checkpoint=PATH")
    if cfg.train.seed is None:
        cfg.train.seed = 0
    model = build_model(cfg, resolve_device(cfg.train.device))
    if detector_in(cfg) is not None:
        model = copy.deepcopy(model)  # the caller's own detector keeps its weights
    model.eval()
    report = load_pretrained(model, cfg.train.init_checkpoint, cfg.train.init_partial)
    compare_with_checkpoint(report, classes, training=False)
    unfilled = [name for name, count in report.modules.items() if not count.loaded_tensors]
    if unfilled:
        raise UserError(
            f"{cfg.train.init_checkpoint} has no weights for {', '.join(unfilled)}: it is not a "
            "trained detector; fine-tune from it first, without --eval-only"
        )
    return model


def do_train(cfg: DictConfig, resume: bool = False, *, hooks: Sequence[HookBase] = ()) -> Results:
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
        hooks: further hooks, which run before those in ``train.hooks``.

    Returns:
        task -> metric -> value at the end of training (also in ``results.json``), on the main
        process. With ``train.diverged_is_result``, a training that diverges has a single task,
        :data:`~region_pretrain.metrics.DIVERGED`, without metrics.

    Raises:
        UserError: the config, the data or the output folder is invalid, or the final evaluation
            failed.
        FloatingPointError: a loss became NaN or infinite.
    """
    complete_train(cfg)
    classes = check_labelled_data(cfg, training=True)
    with start_run(cfg, resume):
        classes.log()
        try:
            return _train(cfg, classes, resume, hooks)
        except NonFiniteLoss as error:
            if not (cfg.train.diverged_is_result and error.everywhere):
                raise
            logger.warning("%s", error)
            results: Results = {DIVERGED: {}}
            if comm.is_main_process():
                _write_results(os.path.join(cfg.train.output_dir, "results.json"), results)
            return results


def _train(
    cfg: DictConfig, classes: Classes, resume: bool, more_hooks: Sequence[HookBase]
) -> Results:
    with missing_files_are_user_errors():
        data = detection_training_data(
            cfg.dataloader.train, cfg.train.seed, cfg.train.max_unreadable, cfg.train.output_dir
        )
        if "test" in cfg.dataloader:
            # Finds missing and broken files now, not after the training.
            files = getattr(data, "files", ())  # other loaders do not tell
            build_test_loader(cfg.dataloader.test, read_images=True, trained_on=files)

    def make_hooks(trainer: Trainer) -> list[HookBase]:
        # All batch norms may be frozen.
        if cfg.train.precise_bn.enabled and get_bn_modules(trainer.module):
            return [_precise_bn(cfg, trainer, data), *more_hooks]
        return list(more_hooks)

    evaluate = partial(do_test, cfg) if "evaluator" in cfg.dataloader else None
    _, results = run_training(
        cfg, data, resume=resume, classes=classes, make_hooks=make_hooks, evaluate=evaluate
    )
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


class _PreciseBN(hooks.PreciseBN):
    """Changes nothing else: each update has its own iterator, and the random state is kept."""

    def update_stats(self) -> None:
        self.trainer.check_weights()
        self._data_iter = None
        usual = precise_bn._PopulationVarianceEstimator
        precise_bn._PopulationVarianceEstimator = _OfRegions
        try:
            with random_state_kept():  # detectors draw proposals
                super().update_stats()
        finally:
            precise_bn._PopulationVarianceEstimator = usual
        self._data_iter = None


class _OfRegions(precise_bn._PopulationVarianceEstimator):
    """Leaves out batches without a region, by whose number fvcore would divide.

    A head that never sees one keeps its statistics.
    """

    def __init__(self, mean_buffer: Tensor, var_buffer: Tensor) -> None:
        super().__init__(mean_buffer, var_buffer)
        self.pop_mean += mean_buffer
        self.pop_square_mean += var_buffer + mean_buffer.square()

    def update(self, batch_mean: Tensor, batch_var: Tensor, batch_size: int) -> None:
        if batch_size:
            super().update(batch_mean, batch_var, batch_size)


def _precise_bn(cfg: DictConfig, trainer: Trainer, data: TrainingData) -> HookBase:
    count = cfg.train.precise_bn.num_iter
    batches = _NextBatches(trainer, data, count)
    return _PreciseBN(cfg.train.eval_period, trainer.module, batches, count)


def without_nan(results: Results) -> Results:
    """Results with None for NaN, the AP of a class without boxes: JSON has no NaN."""
    return {
        task: {name: None if value is None or isnan(value) else value for name, value in v.items()}
        for task, v in results.items()
    }


def _write_results(path: str, results: Results) -> None:
    if results:
        write_json(path, without_nan(results))
        logger.info("results: %s", os.path.abspath(path) if is_local(path) else path)
