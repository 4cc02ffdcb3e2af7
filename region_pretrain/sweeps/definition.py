"""The definition of a sweep: the dict ``sweep`` of a LazyConfig file, checked key by key."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from region_pretrain.config import load_file
from region_pretrain.errors import UserError, did_you_mean
from region_pretrain.overrides import apply_overrides

FINAL = "final"
_NAME = re.compile(r"[\w.+-]+")
#: Arguments of the search that change the recipe, whose id the pre-training compares.
_OF_RECIPE = ("--recipe", "--set", "--working-size")


@dataclass
class Pretrain:
    """A pre-training, run once per seed.

    Attributes:
        config: its config file.
        overrides: ``key=value`` overrides of the config.
        label: its name in tables; empty: its key in the sweep.
        regions: path of an existing region store; null: the sweep generates the regions that the
            config needs.
        init_from: another entry of ``sweep.pretrain``; its final checkpoint of the same seed
            initialises this pre-training. null: the config's ``train.init_checkpoint``.
        finetune_overrides: overrides of the fine-tunings from it, applied after their own.
        images_seen: its length in images; null: ``sweep.images_seen``.
        method: name of its curve in figures against the images seen; the pre-trainings of one
            method, of several lengths, share it. Empty: its label.
    """

    config: str = MISSING
    overrides: list[str] = field(default_factory=list)
    label: str = ""
    regions: str | None = None
    init_from: str | None = None
    finetune_overrides: list[str] = field(default_factory=list)
    images_seen: int | None = None
    method: str = ""


@dataclass
class Baseline:
    """An initialisation that the sweep does not pre-train.

    Attributes:
        init_checkpoint: path or URL of the weights; empty: random weights.
        label: its name in tables; empty: its key in the sweep.
        finetune_overrides: overrides of the fine-tunings from it, applied after their own.
    """

    init_checkpoint: str = ""
    label: str = ""
    finetune_overrides: list[str] = field(default_factory=list)


@dataclass
class Finetune:
    """A fine-tuning, run from every initialisation.

    Attributes:
        config: a detection config.
        overrides: ``key=value`` overrides of the config.
        seeds: seeds of the fine-tunings from each pre-training, which also select label subsets;
            a baseline is fine-tuned once per seed. Empty: each pre-training is fine-tuned once,
            with its own seed.
        label_fractions: fractions of the labelled images, each in (0, 1]; below 1, the seed selects
            the subset.
        label_split: split file that lists the images of each fraction and seed, instead of a random
            subset; see :func:`region_pretrain.data.few_label.listed_images`.
        checkpoints: ``"final"``, or k to fine-tune the pre-training's checkpoint of every k-th
            iteration.
        learning_rates: learning rates to try from each initialisation; the results use the one with
            the best ``metric``. A single one is used without trials; empty: the config's.
        held_out: overrides that evaluate the trials on a split that the results do not use.
        learning_rate_seeds: seeds of the trials. Each learning rate is tried once per seed, from
            the pre-trainings in turn, and the best mean is used.
        metric: ``task/metric`` of ``results.json`` that selects the learning rate.
    """

    config: str = MISSING
    overrides: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)
    label_fractions: list[float] = field(default_factory=lambda: [1.0])
    label_split: str = ""
    checkpoints: str | int = FINAL
    learning_rates: list[float] = field(default_factory=list)
    held_out: list[str] = field(default_factory=list)
    learning_rate_seeds: list[int] = field(default_factory=lambda: [1000])
    metric: str = "bbox/AP"


@dataclass
class RegionGeneration:
    """How the sweep generates region stores.

    Attributes:
        shards: tasks that share the work of one store.
        arguments: additional arguments of ``tools/make_regions.py``.
    """

    shards: int = 1
    arguments: list[str] = field(default_factory=lambda: ["--workers", "1"])


@dataclass
class Sweep:
    """A sweep. A pre-training or a baseline is an *initialisation* of the fine-tunings.

    Attributes:
        pretrain: name -> pre-training; null removes one on the command line.
        baselines: name -> baseline.
        finetune: name -> fine-tuning.
        output_dir: folder of all runs; empty: ``output/sweeps/<name>``.
        name: the sweep's name; empty: the name of its file.
        title: heading of the report; empty: the name.
        notes: text beside the results, e.g. which ones to expect.
        seeds: seeds of pre-training and, unless ``finetune.NAME.seeds`` lists others, of
            fine-tuning; each run is repeated once per seed.
        images_seen: length of every pre-training in images; null: as its config says.
        pretrain_overrides: overrides of all pre-trainings, applied after their own.
        finetune_overrides: overrides of all fine-tunings, applied after their own.
        regions: how region stores are generated.
        pictures: number of images per picture of the report; 0: no pictures.
    """

    pretrain: dict[str, Pretrain | None] = field(default_factory=dict)
    baselines: dict[str, Baseline | None] = field(default_factory=dict)
    finetune: dict[str, Finetune | None] = field(default_factory=dict)
    output_dir: str = ""
    name: str = ""
    title: str = ""
    notes: str = ""
    seeds: list[int] = field(default_factory=lambda: [0])
    images_seen: int | None = None
    pretrain_overrides: list[str] = field(default_factory=list)
    finetune_overrides: list[str] = field(default_factory=list)
    regions: RegionGeneration = field(default_factory=RegionGeneration)
    pictures: int = 4

    @property
    def labels(self) -> dict[str, str]:
        """Initialisation -> its name in tables, baselines first."""
        return {name: init.label or name for name, init in (self.baselines | self.pretrain).items()}

    @property
    def methods(self) -> dict[str, str]:
        """Pre-training -> the name of its curve in figures against the images seen."""
        return {name: init.method or init.label or name for name, init in self.pretrain.items()}


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep file.

    Args:
        path: a LazyConfig ``.py`` file that defines a dict ``sweep``.
        overrides: ``sweep.key=value``, as for every config.

    Raises:
        UserError: the file is missing or defines no ``sweep``, or a key or value is invalid.
    """
    cfg = load_file(path)
    if not isinstance(cfg.get("sweep"), DictConfig):
        raise UserError(f"{path} is not a sweep file: it must define a dict called sweep")
    # The overrides apply to the plain values and all defaults, as in any config.
    given = _typed(OmegaConf.to_container(cfg.sweep, resolve=True))
    plain = OmegaConf.create({"sweep": OmegaConf.to_container(given)})
    values = OmegaConf.to_container(apply_overrides(plain, overrides), resolve=True)["sweep"]
    return parse_sweep(values, Path(path).stem)


def parse_sweep(values: Mapping[str, Any], name: str) -> Sweep:
    """Check the values of a dict ``sweep``.

    Args:
        values: its keys and values; those that are missing or null take their defaults.
        name: default name of the sweep.

    Raises:
        UserError: a key or value is invalid.
    """
    try:
        sweep = OmegaConf.to_object(_typed(values))
    except MissingMandatoryValue as error:
        where, _, key = error.full_key.rpartition(".")
        raise UserError(f"sweep.{where} has no {key}: set sweep.{error.full_key}") from None
    sweep.name = sweep.name or name
    sweep.output_dir = sweep.output_dir or f"output/sweeps/{sweep.name}"
    for group in ("pretrain", "baselines", "finetune"):
        entries = getattr(sweep, group)
        setattr(sweep, group, {k: entry for k, entry in entries.items() if entry is not None})
    _check(sweep)
    return sweep


def _typed(values: Mapping[str, Any]) -> DictConfig:
    typed = OmegaConf.structured(Sweep)
    for key, value in values.items():
        if value is None and key in typed:
            continue
        try:
            typed.merge_with({key: value})
        except OmegaConfBaseException as error:
            raise UserError(_explain(error, f"sweep.{error.full_key or key}")) from None
    return typed


def _explain(error: OmegaConfBaseException, key: str) -> str:
    text = str(error).splitlines()[0]
    if re.match(r"Key '.*' not in", text):
        known = [f.name for f in fields(error.object_type)]
        hint = did_you_mean(str(error.key), known, 3, 0.5, f"; known keys: {', '.join(known)}")
        return f"no key {key} in a sweep{hint}"
    if "is not a ListConfig" in text:
        text = "must be a list"
    elif "is not a subclass of" in text or "Cannot merge DictConfig" in text:
        text = "must be a dict"
    return f"{key}: {text}"


def _check(sweep: Sweep) -> None:
    inits = [*sweep.pretrain, *sweep.baselines]
    if not inits:
        raise UserError("the sweep has neither sweep.pretrain nor sweep.baselines: add one")
    for name in [*inits, *sweep.finetune]:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} names folders: use only letters, digits and . _ + -")
    if both := sorted(set(sweep.pretrain) & set(sweep.baselines)):
        raise UserError(f"sweep.pretrain and sweep.baselines both have {', '.join(both)}: rename")
    labels = list(sweep.labels.values())
    if len(set(labels)) != len(labels):
        raise UserError(f"two initialisations have the same label: {', '.join(labels)}")
    if not sweep.seeds:
        raise UserError("sweep.seeds=[]: list at least one seed")
    _check_unique("sweep.seeds", sweep.seeds)
    if sweep.pictures < 0:
        raise UserError(f"sweep.pictures={sweep.pictures}: must be at least 0")
    if sweep.regions.shards < 1:
        raise UserError(f"sweep.regions.shards={sweep.regions.shards}: must be at least 1")
    for word in sweep.regions.arguments:
        if word.partition("=")[0] in _OF_RECIPE:
            raise UserError(
                f"sweep.regions.arguments has {word}, but the recipe is the pre-training's: add "
                'dataloader.train.dataset.recipe="RECIPE+FIELD=VALUE" to its overrides'
            )
    for name in sweep.pretrain:
        _check_chain(sweep, name)
    for name, entry in sweep.finetune.items():
        _check_finetune(f"sweep.finetune.{name}", entry)
    periods = sorted({e.checkpoints for e in sweep.finetune.values() if e.checkpoints != FINAL})
    if len(periods) > 1:
        raise UserError(
            f"sweep.finetune.*.checkpoints={periods}: all fine-tunings need the same period"
        )


def _check_chain(sweep: Sweep, name: str) -> None:
    key = "train.init_checkpoint"
    chain = [name]
    while (source := sweep.pretrain[chain[-1]].init_from) is not None:
        where = f"sweep.pretrain.{chain[-1]}.init_from={source}"
        if source in sweep.baselines:
            raise UserError(f"{where}: {source} is a baseline; instead add {key}=FILE to overrides")
        if source not in sweep.pretrain:
            known = ", ".join(sweep.pretrain)
            raise UserError(f"{where}: sweep.pretrain has no {source}, only {known}")
        given = [o for o in sweep.pretrain[chain[-1]].overrides if o.startswith(f"{key}=")]
        if given:
            raise UserError(f"{where} and the override {given[0]} exclude each other: remove one")
        if source in chain:
            circle = " -> ".join([*chain[chain.index(source) :], source])
            raise UserError(f"sweep.pretrain: init_from is circular: {circle}")
        chain.append(source)


def _check_unique(key: str, values: Sequence[Any]) -> None:
    if len(set(values)) != len(values):
        raise UserError(f"{key}={list(values)}: lists the same value twice")


def _check_finetune(where: str, entry: Finetune) -> None:
    fractions, rates, period = entry.label_fractions, entry.learning_rates, entry.checkpoints
    _check_unique(f"{where}.label_fractions", fractions)
    _check_unique(f"{where}.learning_rates", rates)
    _check_unique(f"{where}.seeds", entry.seeds)
    _check_unique(f"{where}.learning_rate_seeds", entry.learning_rate_seeds)
    if not entry.learning_rate_seeds:
        raise UserError(f"{where}.learning_rate_seeds=[]: list at least one seed")
    if not fractions or not all(0 < f <= 1 for f in fractions):
        raise UserError(f"{where}.label_fractions={fractions}: must be fractions in (0, 1]")
    if not all(r > 0 for r in rates):
        raise UserError(f"{where}.learning_rates={rates}: must be above 0")
    if len(rates) > 1 and not entry.held_out:
        raise UserError(
            f"{where} tries {len(rates)} learning rates: {where}.held_out must name the split to "
            "choose on, e.g. ['dataloader.test.dataset.names=...'], not that of the results"
        )
    if period != FINAL and not (isinstance(period, int) and period > 0):
        raise UserError(
            f"{where}.checkpoints={period!r}: must be 'final' or a period in iterations"
        )
    if not re.fullmatch(r"\w+/\w+", entry.metric):
        raise UserError(f"{where}.metric={entry.metric!r}: must be task/metric, e.g. bbox/AP")
    if re.match(r"(bbox|segm|keypoints)/(?!AP)", entry.metric):
        raise UserError(f"{where}.metric={entry.metric!r}: is written bbox/AP, segm/AP50, ...")
