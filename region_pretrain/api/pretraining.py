"""Pre-training in one call."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from detectron2.config import CfgNode
from omegaconf import DictConfig
from torch import nn

from region_pretrain.api.data import Data, DataSets, records_of
from region_pretrain.api.detectors import (
    DETECTOR_FILE,
    AnyDetector,
    detection_config,
    of_yacs,
    plain,
)
from region_pretrain.api.regions import digits_of
from region_pretrain.api.results import Pretrained, Run
from region_pretrain.api.session import Callback, Given, KeepModel, hooks_of, isolated
from region_pretrain.config import (
    check_pretraining,
    complete_train,
    load_config,
    override_config,
    to_yaml,
)
from region_pretrain.convert.reading import checkpoint_of
from region_pretrain.convert.recognise import check_weights
from region_pretrain.dataset_names import make_names_absolute
from region_pretrain.engine.build import build_pretraining_model
from region_pretrain.engine.methods import is_recipe, load_method
from region_pretrain.engine.output_dir import holds_run, refuse_existing_run
from region_pretrain.engine.pretrain import check_before_regions, do_pretrain
from region_pretrain.engine.writer_list import check_writers
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.modeling.given import detector_in, modes_kept, weights_kept
from region_pretrain.modeling.meta_arch import PretrainingModel, check_names, renew_momentum_copies
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions
from region_pretrain.yacs import refuse_weights, split_overrides

logger = logging.getLogger(__name__)

#: Beginnings of the overrides that change the detector itself.
_OF_DETECTOR = ("model.backbone.", "model.pixel_", "model.input_format=")
_REGIONS = "dataloader.train.dataset.regions"

#: Weights: a run, or what ``train.init_checkpoint`` accepts; also a run's folder.
Weights = Run | str | os.PathLike


def pretrain(
    method: str | os.PathLike | DictConfig,
    *,
    images: Data = None,
    detector: AnyDetector = None,
    regions: RegionStore | str | os.PathLike | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    init: Weights | None = None,
    overrides: Sequence[str] = (),
    callbacks: Callback | Sequence[Callback] = (),
    resume: bool = False,
    verbose: bool = False,
) -> Pretrained:
    """Pre-train a detector's modules without labels, in this process.

    Ctrl-C stops after the current step, saves a checkpoint and raises ``KeyboardInterrupt``.

    Args:
        method: the name of a method (a folder of ``projects/``), or the path of a recipe of your
            own, to pre-train ``detector`` with; or a config that has a detector: a path or a loaded
            config.
        images: see :data:`~region_pretrain.api.data.Data`; None: the config's.
        detector: see :data:`~region_pretrain.api.detectors.AnyDetector`. The modules of a built
            detector are trained themselves, from the weights that they have.
        regions: a region store. None: if the method needs regions, those of ``images`` are made
            with the method's recipe in ``output_dir``.
        steps: length in iterations; the shape of the schedules does not change.
        epochs: length in epochs instead. None for both: the config's length.
        batch_size: images per iteration; the learning rate is scaled with it.
        output_dir: the run's folder; None: the config's.
        init: initial weights: a run, or what ``train.init_checkpoint`` accepts.
        overrides: ``key=value``, applied before all other arguments.
        callbacks: functions that are called after each step with the trainer (``trainer.iter``,
            ``trainer.storage``, ``trainer.module``), or hooks of Detectron2.
        resume: continue the run in ``output_dir``, if there is one.
        verbose: show the complete log, not only progress and warnings; ``log.txt`` has all of it.

    Returns:
        The model and the metrics. The modules of a built detector have the new weights.

    Raises:
        UserError: an argument, the data or the output folder is invalid, or the method cannot train
            the detector.
        FloatingPointError: a loss became NaN or infinite.
    """
    hooks = hooks_of(callbacks)
    cfg, given, detector = compose(
        method,
        images=images,
        detector=detector,
        regions=regions,
        steps=steps,
        epochs=epochs,
        batch_size=batch_size,
        output_dir=output_dir,
        init=init,
        overrides=overrides,
    )
    described = _describe(detector)
    text = to_yaml(described) if isinstance(described, DictConfig) else ""

    def save_detector() -> None:
        path = os.path.join(cfg.train.output_dir, DETECTOR_FILE)
        if text:
            write_text_atomic(path, text)
        elif not resume and os.path.exists(path):  # of an attempt that ended before it had results
            os.remove(path)

    keep, is_built = KeepModel(save_detector), isinstance(detector, nn.Module)
    with ExitStack() as stack:
        stack.enter_context(isolated(given, verbose))
        if not resume:
            refuse_existing_run(cfg.train.output_dir)
            check_weights(cfg.train.init_checkpoint)
        if not (resume and holds_run(cfg.train.output_dir)):
            check_before_search(cfg, detector)
        find_regions(cfg)
        if is_built:
            stack.enter_context(modes_kept(detector))
        build = _build_around(detector) if is_built else build_pretraining_model
        metrics = do_pretrain(cfg, resume, hooks=[keep, *hooks], build=build)
    model = keep.model if is_built else keep.model.eval()
    return Pretrained(model, metrics, cfg.train.output_dir, cfg, described, given)


def pretrain_config(method: str | os.PathLike | DictConfig, **settings: Any) -> DictConfig:
    """The config of a pre-training, as ``tools/pretrain_net.py`` composes it.

    Args:
        method: see :func:`pretrain`.
        **settings: the arguments of :func:`pretrain`, except ``callbacks``, ``resume`` and
            ``verbose``.

    Returns:
        A config for :func:`pretrain`, :func:`~region_pretrain.api.pictures.show_views` and
        ``LazyConfig.save``.

    Raises:
        UserError: see :func:`pretrain`; or ``images`` are records.
    """
    cfg, given, _ = compose(method, **settings)
    if given:
        raise UserError("a config cannot contain records: pass images= to pretrain instead")
    return cfg


class Composed(NamedTuple):
    """A config, the data sets that were passed as records, and the detector."""

    cfg: DictConfig
    given: Given
    detector: AnyDetector


def compose(
    method: str | os.PathLike | DictConfig,
    *,
    images: Data = None,
    detector: AnyDetector = None,
    regions: RegionStore | str | os.PathLike | None = None,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    output_dir: str | os.PathLike | None = None,
    init: Weights | None = None,
    overrides: Sequence[str] = (),
) -> Composed:
    """Turn the arguments of :func:`pretrain` into a config."""
    refuse_two_lengths(steps, epochs, overrides)
    cfg, detector = _load(method, detector, overrides)
    data, dataset = DataSets(), cfg.dataloader.train.dataset
    if images is not None:
        dataset.names = data.name("images", images)
    make_names_absolute(cfg)
    set_run(cfg, steps, epochs, output_dir, init)
    if batch_size is not None:
        cfg.dataloader.train.total_batch_size = batch_size
    if isinstance(regions, RegionStore):
        dataset.regions, dataset.recipe = regions.path, regions.manifest["recipe"]
    elif regions is not None:
        dataset.regions = os.path.expanduser(os.fspath(regions))
    elif (
        images is not None
        and dataset.get("regions") is not None
        and not any(text.lstrip("+").startswith(f"{_REGIONS}=") for text in overrides)
    ):
        dataset.regions = _own_regions(cfg)
    return Composed(complete_train(cfg), data.given, detector)


def _load(
    method: str | os.PathLike | DictConfig, detector: AnyDetector, overrides: Sequence[str]
) -> tuple[DictConfig, AnyDetector]:
    method = method if isinstance(method, DictConfig) else os.fspath(method)
    if isinstance(method, str) and (not method.endswith((".py", ".yaml")) or is_recipe(method)):
        if detector is None:
            raise UserError(f"method {method!r} needs detector=: a detection config or a detector")
        upper, lower = split_overrides(overrides)
        refuse_weights(upper)
        detector = of_yacs(plain(detector), upper) if upper else plain(detector)
        own = [text for text in lower if text.lstrip("+").startswith(_OF_DETECTOR)]
        if own and not isinstance(detector, nn.Module):
            logger.warning(
                "fine-tuning with the detector of this run will not have the overrides %s: to have "
                "them there as well, change the detector's config",
                " ".join(own),
            )
        left = [] if isinstance(detector, CfgNode) else upper  # refused with a reason
        return load_method(method, detector, [*left, *lower]), detector
    if detector is not None:
        raise UserError("this config has a detector: leave out detector=, or name a method instead")
    if isinstance(method, str):
        cfg = load_config(method, overrides)
    else:
        cfg = override_config(complete_train(copy.deepcopy(method)), overrides, "")
    check_pretraining(cfg)
    return cfg, detector_in(cfg)


def refuse_two_lengths(steps: int | None, epochs: float | None, overrides: Sequence[str]) -> None:
    """Refuse ``steps`` together with ``epochs``, and either with an override that they replace."""
    if steps is not None and epochs is not None:
        raise UserError("steps= and epochs= exclude each other: give one of them")
    if steps is None and epochs is None:
        return
    given = f"steps={steps}" if epochs is None else f"epochs={epochs:g}"
    for text in overrides:
        if text.lstrip("+").partition("=")[0] in ("train.max_iter", "train.epochs"):
            raise UserError(f"{given} replaces the override {text!r}: give one of them")


def set_run(
    cfg: DictConfig,
    steps: int | None,
    epochs: float | None,
    output_dir: str | os.PathLike | None,
    init: Weights | None,
) -> None:
    """Set a run's length, folder and initial weights, if they are given."""
    if steps is not None:
        cfg.train.max_iter = steps
    elif epochs is not None:
        cfg.train.max_iter, cfg.train.epochs = None, epochs
    if output_dir is not None:
        cfg.train.output_dir = os.path.expanduser(os.fspath(output_dir))
    if init is not None:
        cfg.train.init_checkpoint = weights_of(init)


def weights_of(init: Weights) -> str:
    """The checkpoint of a run or of its folder; other names do not change."""
    if isinstance(init, Run):
        return init.checkpoint
    if not isinstance(init, str | os.PathLike):
        raise UserError(f"init={init!r}: must be a finished run, or the path or name of weights")
    return checkpoint_of(os.path.expanduser(os.fspath(init)))


def _own_regions(cfg: DictConfig) -> str:
    names = cfg.dataloader.train.dataset.names
    return os.path.join(cfg.train.output_dir, f"regions-{digits_of(names)}.arrow")


def check_before_search(cfg: DictConfig, detector: AnyDetector, drawn: int = 0) -> None:
    """Raise now what would end the run after the search for regions, which may take hours.

    Args:
        cfg: complete; not changed.
        detector: see :func:`pretrain`.
        drawn: only draw as many images, which need no complete batch.
    """
    dataset = cfg.dataloader.train.dataset
    path = dataset.get("regions")
    if path is None or path != _own_regions(cfg) or os.path.exists(path):
        return
    to_yaml(cfg)
    check_writers(cfg.train)
    count = len(records_of(dataset.names))
    if drawn > count:
        raise UserError(f"count={drawn}: there are {count} images")
    if drawn:
        count = max(count, cfg.dataloader.train.total_batch_size)
    if not isinstance(detector, nn.Module):
        check_before_regions(cfg, count)
        return
    with weights_kept(detector), modes_kept(detector):
        check_before_regions(cfg, count, _build_around(detector))


def find_regions(cfg: DictConfig) -> None:
    """Make the regions of a run that has no store but one in its own folder; else do nothing.

    The store of a run that has begun does not change, also if there are new images.
    """
    dataset, folder = cfg.dataloader.train.dataset, cfg.train.output_dir
    path = dataset.get("regions")
    if path is not None and path == _own_regions(cfg):
        if os.path.exists(path) and holds_run(folder):
            return
        os.makedirs(folder, exist_ok=True)
        make_regions(records_of(dataset.names), path, dataset.recipe)


def _describe(detector: AnyDetector) -> AnyDetector:
    """The detector's complete config, if it has one."""
    if detector is None or isinstance(detector, nn.Module):
        return detector
    try:
        return detection_config(detector)
    except UserError:  # e.g. a yacs config without data sets, which pre-training does not need
        return detector


def _build_around(
    detector: nn.Module,
) -> Callable[[DictConfig, torch.device], PretrainingModel]:
    def build(cfg: DictConfig, device: torch.device) -> PretrainingModel:
        detector.to(device)  # all of it, not only the modules that are trained
        with weights_kept(detector):
            model = build_pretraining_model(cfg, device)
        check_names(model, dict(detector.named_modules(remove_duplicate=False)))
        renew_momentum_copies(model)
        return model

    return build
