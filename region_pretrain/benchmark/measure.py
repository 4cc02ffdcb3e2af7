"""Measures a config, and formats the results."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from detectron2.config import instantiate
from omegaconf import DictConfig
from torch import nn

from region_pretrain.benchmark.loader import LoaderRates, benchmark_loader
from region_pretrain.benchmark.step import StepRates, benchmark_step
from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.build import (
    amp_dtype,
    build_model,
    build_optimizer,
    clipping,
    resolve_device,
)
from region_pretrain.engine.kernels import use_fast_kernels
from region_pretrain.engine.trainer import Trainer
from region_pretrain.errors import UserError
from region_pretrain.modeling.trunk import compile_trunks
from region_pretrain.reporting.summary import text_table


def use_images(cfg: DictConfig, names: str, store: str) -> None:
    """Replace a config's data set and regions.

    Args:
        cfg: the config, modified in place.
        names, store: from :func:`~region_pretrain.benchmark.images.make_jpegs`.
    """
    dataset = cfg.dataloader.train.dataset
    dataset.names = names
    if dataset.get("regions") is not None:
        dataset.regions, dataset.recipe = store, None


def synthetic_batch(cfg: DictConfig, size: int) -> ViewBatch:
    """A batch of a config whose images are synthetic; they are repeated if there are fewer.

    Args:
        cfg: changed by :func:`use_images`.
        size: number of images.
    """
    dataset = instantiate(_without_labels(cfg).dataset)
    batch = dataset.batch(0, 0, [i % len(dataset) for i in range(size)])
    return _with_labels(batch, cfg)


def synthetic_loader(cfg: DictConfig) -> Callable[[int, int], Iterator[ViewBatch]]:
    """``iterate`` of a config's loader with synthetic images; see :func:`synthetic_batch`."""
    loader = instantiate(_without_labels(cfg))
    return lambda start, stop: (_with_labels(b, cfg) for b in loader.iterate(start, stop))


def _without_labels(cfg: DictConfig) -> DictConfig:
    """``dataloader.train`` for a flat folder, which has no classes."""
    lazy = copy.deepcopy(cfg.dataloader.train)
    if lazy.dataset.get("labels"):
        lazy.dataset.labels = False
    return lazy


def _with_labels(batch: ViewBatch, cfg: DictConfig) -> ViewBatch:
    """Add arbitrary classes to a batch if the config's data set reads classes."""
    if not cfg.dataloader.train.dataset.get("labels"):
        return batch
    return replace(batch, labels=torch.arange(len(batch)) % 2)


def loader_rates(cfg: DictConfig, seconds: float) -> LoaderRates:
    """Measure ``cfg.dataloader.train``; see :func:`benchmark_loader`."""
    dataset = instantiate(_without_labels(cfg).dataset)
    return benchmark_loader(dataset, cfg.dataloader.train.total_batch_size, seconds)


def step_rates(cfg: DictConfig, seconds: float) -> StepRates:
    """Measure a training step of ``cfg``; see :func:`benchmark_step`.

    Raises:
        UserError: the data set has fewer images than one batch.
    """
    size = cfg.dataloader.train.total_batch_size
    dataset = instantiate(_without_labels(cfg).dataset)
    if len(dataset) < size:
        raise UserError(
            f"dataloader.train.total_batch_size={size} exceeds the {len(dataset)} images: lower "
            "it, or raise --synthetic-images"
        )
    batch = _with_labels(dataset.batch(0, 0, range(size)), cfg)
    return benchmark_step(make_trainer(cfg, resolve_device(cfg.train.device)), batch, seconds)


def make_trainer(
    cfg: DictConfig, device: torch.device, prepare: Callable[[nn.Module], object] = lambda model: 0
) -> Trainer:
    """A trainer of a config in one process, without data.

    Args:
        cfg: a pre-training config.
        device: device of the model.
        prepare: called with the model before the optimiser is built.
    """
    use_fast_kernels(cfg.train, device)
    model = build_model(cfg, device)
    prepare(model)
    trainer = Trainer(
        model,
        # The learning rate does not affect the time; a small one keeps the numbers finite.
        build_optimizer(cfg, model, 1e-6),
        lambda start, stop: (),
        device=device,
        amp_dtype=amp_dtype(cfg.train.amp, device),
        accumulate_steps=cfg.train.accumulate_steps,
        **clipping(cfg.train.clip_grad),
    )
    if cfg.train.compile:
        compile_trunks(model)
    return trainer


def describe_loader(rates: LoaderRates) -> str:
    """Format the results as text."""
    width, height, kilobytes = rates.size
    rates_by_name = {
        "decoding alone (cv2.imdecode)": rates.decode,
        "loader, linear filter": rates.linear,
        "loader, antialiased filter": rates.antialiased,
    }
    rows = [[name, f"{r:.0f}", f"{r / rates.decode:.2f}"] for name, r in rates_by_name.items()]
    parts = ", ".join(f"{name} {100 * part:.0f} %" for name, part in rates.parts.items())
    return (
        f"\nLoader on one core; mean file: {width:.0f} x {height:.0f} pixels, {kilobytes:.0f} kB\n"
        + text_table(rows, ["", "images/s", "relative"])
        + f"\ntime of the antialiased loader: {parts}"
        + f"\nchange of resident memory: {rates.drift_mib:+.1f} MiB\n"
    )


def describe_step(rates: StepRates) -> str:
    """Format the results as text."""
    total = sum(rates.parts.values())
    rows = [
        [name, f"{1000 * seconds:.1f}", f"{100 * seconds / total:.1f}"]
        for name, seconds in sorted(rates.parts.items(), key=lambda part: -part[1])
    ]
    return (
        f"\nTraining step of {rates.images} images: {1000 * rates.step:.1f} ms, "
        f"{rates.images / rates.step:.2f} images/s\n"
        f"forward and backward of the networks alone: {1000 * rates.floor:.1f} ms, "
        f"{100 * rates.floor / rates.step:.0f} % of the step\n"
        f"peak memory: {rates.memory_mib:.0f} MiB\n" + text_table(rows, ["part", "ms", "%"]) + "\n"
    )
