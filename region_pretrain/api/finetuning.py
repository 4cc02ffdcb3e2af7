"""Fine-tuning and evaluation in one call."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from region_pretrain import zoo
from region_pretrain.api.data import Data, DataSets
from region_pretrain.api.detectors import (
    DETECTOR_FILE,
    AnyDetector,
    detection_config,
    load_detection_config,
)
from region_pretrain.api.pretraining import Weights, refuse_two_lengths, set_run, weights_of
from region_pretrain.api.results import Finetuned, Run
from region_pretrain.api.session import Callback, KeepModel, hooks_of, isolated
from region_pretrain.config import complete_train, num_classes_keys
from region_pretrain.convert.recognise import check_weights
from region_pretrain.data.evaluators import evaluators_of
from region_pretrain.dataset_names import make_names_absolute
from region_pretrain.engine.finetune import do_evaluate, do_train, without_nan
from region_pretrain.engine.labelled_data import check_labelled_data, difference_of
from region_pretrain.errors import UserError
from region_pretrain.metrics import Results, newest_metrics
from region_pretrain.modeling.given import detector_in, modes_kept

_NAMES = "dataloader.{}.dataset.names"


def finetune(
    init: Weights | nn.Module | None,
    *,
    train: Data,
    val: Data,
    classes: Sequence[str] = (),
    detector: AnyDetector = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    output_dir: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    callbacks: Callback | Sequence[Callback] = (),
    resume: bool = False,
    verbose: bool = False,
) -> Finetuned:
    """Fine-tune a detector on boxes and evaluate it, in this process.

    Ctrl-C stops after the current step, saves a checkpoint and raises ``KeyboardInterrupt``.

    Args:
        init: initial weights: a run, a checkpoint, or what else ``train.init_checkpoint`` accepts;
            a built detector, which is trained itself; or None for random weights.
        train, val: labelled images, see :data:`~region_pretrain.api.data.Data`. The number of
            classes is that of ``train``.
        classes: names of the classes: required for records with annotations, else compared with the
            data's.
        detector: see :data:`~region_pretrain.api.detectors.AnyDetector`; None: the detector of
            ``init``.
        steps, epochs, output_dir, callbacks, resume, verbose: see
            :func:`~region_pretrain.api.pretraining.pretrain`.
        batch_size: images per iteration.
        lr: the learning rate at this batch size. None: the config's, which is scaled with the batch
            size if the config has ``train.base_batch_size``, as Detectron2's 1x schedule does here.
        overrides: ``key=value``, applied before all other arguments.

    Returns:
        The detector and its results on ``val``.

    Raises:
        UserError: an argument, the data or the output folder is invalid.
        FloatingPointError: a loss became NaN or infinite.
    """
    hooks, data = hooks_of(callbacks), DataSets()
    refuse_two_lengths(steps, epochs, overrides)
    if isinstance(init, nn.Module) and detector not in (None, init):
        raise UserError(
            "init is a built detector, which would be trained itself: leave out detector=, or give "
            "init the run or the checkpoint"
        )
    detector = _detector_of(init) if detector is None else detector
    cfg = detection_config(detector, overrides)
    for split, argument, value in (("train", "train", train), ("test", "val", val)):
        _set_names(cfg, split, data.name(argument, value, classes))
    given = {text.lstrip("+").partition("=")[0] for text in overrides}
    for key in num_classes_keys(cfg):
        if not given & {key, key.removeprefix("model.cfg.")}:  # a yacs config's
            OmegaConf.update(cfg, key, None)
    is_module = isinstance(init, nn.Module)
    set_run(cfg, steps, epochs, output_dir, None if is_module or init is None else init)
    if init is None:
        cfg.train.init_checkpoint = ""
    if not resume:
        check_weights(cfg.train.init_checkpoint)
    if batch_size is not None:
        cfg.dataloader.train.total_batch_size = batch_size
    if lr is not None:
        cfg.optimizer.lr, cfg.train.base_batch_size = lr, None
    make_names_absolute(cfg)

    keep, built = KeepModel(), detector_in(cfg)
    with ExitStack() as stack:
        stack.enter_context(isolated(data.given, verbose))
        names = _check_classes(cfg, classes, built)
        if built is not None:
            stack.enter_context(modes_kept(built))
        results = without_nan(do_train(cfg, resume, hooks=[keep, *hooks]))
    model = keep.model if built is not None else keep.model.eval()
    folder = cfg.train.output_dir
    return Finetuned(
        model, newest_metrics(folder), folder, cfg, detector, data.given, results, names
    )


def _detector_of(init: Weights | nn.Module | None, argument: str = "detector") -> AnyDetector:
    if isinstance(init, nn.Module):
        return init
    if isinstance(init, Finetuned):
        return init.config
    found = init.detector if isinstance(init, Run) else _saved_detector(init)
    if found is None:
        raise UserError(
            f"the weights do not come with a detection config: give {argument}=CONFIG, that of the "
            "detector"
        )
    return found


def _saved_detector(init: str | os.PathLike | None) -> str | None:
    """The detection config on the card of published weights, or in the folder of a checkpoint."""
    if isinstance(init, str) and init.startswith(zoo.PREFIX):
        return zoo.read_card(init).metadata.get("Detector")
    if init is None:
        return None
    path = weights_of(init)
    check_weights(path)
    folder = os.path.dirname(path)
    for name in (DETECTOR_FILE, "config.yaml"):
        path = os.path.join(folder, name)
        if os.path.isfile(path):
            try:
                load_detection_config(path)
            except UserError:
                continue
            return path
    return None


def _set_names(cfg: DictConfig, split: str, names: Any) -> None:
    key = _NAMES.format(split)
    if OmegaConf.select(cfg, key.rpartition(".")[0]) is None:
        raise UserError(f"the detector's config has no {key}, which train= and val= replace")
    OmegaConf.update(cfg, key, names, merge=False)
    for evaluator in evaluators_of(cfg) if split == "test" else ():
        if "dataset_name" in evaluator.lazy:  # in an own config, a literal name
            dots = "." * (1 + evaluator.key.count("."))
            evaluator.lazy.dataset_name = f"${{{dots}test.dataset.names}}"


def _check_classes(
    cfg: DictConfig, classes: Sequence[str], detector: nn.Module | None, training: bool = True
) -> list[str]:
    """The names of the data's classes, once they agree with the argument and a built detector."""
    names = check_labelled_data(copy.deepcopy(cfg), training=training, fix=False).names
    if classes and list(classes) != names:
        raise UserError(f"classes={list(classes)}, but the data's are {names}")
    count = getattr(getattr(detector, "roi_heads", detector), "num_classes", None)
    if isinstance(count, int) and count != len(names):
        raise UserError(
            f"the detector predicts {count} classes, but the data have {len(names)} "
            f"({', '.join(names)}): build it with {len(names)}, or pass its config"
        )
    return names


def evaluate(
    detector: Finetuned | str | os.PathLike | nn.Module,
    data: Data = None,
    *,
    classes: Sequence[str] = (),
    config: AnyDetector = None,
    output_dir: str | os.PathLike | None = None,
    overrides: Sequence[str] = (),
    verbose: bool = False,
) -> Results:
    """Evaluate a detector.

    Args:
        detector: the result of :func:`finetune`, the checkpoint or folder of a fine-tuning, or a
            built detector.
        data: labelled images, see :data:`~region_pretrain.api.data.Data`; None: the ``val`` of the
            fine-tuning.
        classes: see :func:`finetune`.
        config: the detector's config; None: that of the fine-tuning.
        output_dir: where ``results_eval.json`` is written; None: the folder of the fine-tuning, or
            of ``config``; of a built detector, ``train.output_dir`` of the default config.
        overrides: ``key=value`` of the config; those of ``model`` need a checkpoint or a folder.
        verbose: see :func:`~region_pretrain.api.pretraining.pretrain`.

    Returns:
        task (``bbox``, ``segm``) -> metric (``AP``, ``AP50``, ...) -> percent; None where it is
        undefined, e.g. the AP of a class without boxes.

    Raises:
        UserError: an argument is invalid, or the data have other classes.
    """
    sets = DataSets()
    is_module = isinstance(detector, nn.Module)
    if is_module and data is None:
        raise UserError("data= is needed to evaluate a built detector")
    if isinstance(detector, Run) and not isinstance(detector, Finetuned):
        raise UserError(
            f"{detector.output_dir} is a pre-training, not a detector: fine-tune it first"
        )
    config_of = config or _detector_of(detector, "config")
    if config is None and os.path.basename(str(config_of)) == DETECTOR_FILE:
        raise UserError(f"{detector} is a pre-training, not a detector: fine-tune it first")
    cfg = detection_config(config_of, overrides)
    model = detector if is_module else None
    if isinstance(detector, Finetuned):
        model, sets.given = detector.model, dict(detector.given)
    elif not is_module:
        path = cfg.train.init_checkpoint = weights_of(detector)
        check_weights(path)
        # The run's own folder, also if it was moved or the call is from another one.
        if config is None and os.path.isfile(path):
            cfg.train.output_dir = os.path.dirname(os.path.abspath(path))
    changed = [text for text in overrides if text.lstrip("+~").startswith("model.")]
    if model is not None and changed:
        raise UserError(
            f"override {changed[0]!r} would not change the detector, which is built already: give "
            "its checkpoint or the folder of its run instead"
        )
    if data is not None:
        _set_names(cfg, "test", sets.name("data", data, classes))
    if output_dir is not None:
        cfg.train.output_dir = os.fspath(output_dir)
    make_names_absolute(complete_train(cfg))
    with isolated(sets.given, verbose):
        # On its own val, a fine-tuning has been compared already, also with mappers that rename.
        names = _check_classes(cfg, classes, None if data is None else model, training=False)
        known = detector.classes if isinstance(detector, Finetuned) and data is not None else ()
        if difference := difference_of(known, names):
            raise UserError(f"data: other classes than those of the fine-tuning: {difference}")
        return without_nan(do_evaluate(cfg, model))
