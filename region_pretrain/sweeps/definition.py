"""What a sweep is: the dict ``sweep`` of a lazy-config file, checked key by key."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from region_pretrain.config import apply_overrides, load_file
from region_pretrain.errors import UserError

FINAL = "final"
_NAME = re.compile(r"[\w.+-]+")


@dataclass(frozen=True)
class Pretrain:
    """A pre-training, one run a seed.

    Attributes:
        config: its config file.
        overrides: of the config, ``key=value``.
        label: what tables call it; empty: its name.
        regions: a region store that exists; null: the sweep makes what the config asks for.
        finetune_overrides: overrides of the fine-tunings from it, applied after their own.
    """

    config: str
    overrides: tuple[str, ...] = ()
    label: str = ""
    regions: str | None = None
    finetune_overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Baseline:
    """A start without a pre-training of the sweep's.

    Attributes:
        init_checkpoint: weights; empty: random ones.
        label: what tables call it; empty: its name.
        finetune_overrides: overrides of the fine-tunings from it, applied after their own.
    """

    init_checkpoint: str = ""
    label: str = ""
    finetune_overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finetune:
    """A fine-tuning of every start.

    Attributes:
        config: a detection config.
        overrides: of the config.
        fractions: parts of the labelled images, each in (0, 1]; below 1 the seed draws them.
        checkpoints: ``"final"``, or k: the pre-training's checkpoints after every k iterations.
        rates: learning rates that each start is tried at; the best by ``metric`` is taken. With a
            single one nothing is tried; with none the config's is taken.
        held_out: overrides that make the config evaluate on a split that the results do not use.
        rate_seed: seed of the runs that choose the rate.
        metric: what the choice goes by, ``task/metric`` of ``results.json``.
    """

    config: str
    overrides: tuple[str, ...] = ()
    fractions: tuple[float, ...] = (1.0,)
    checkpoints: str | int = FINAL
    rates: tuple[float, ...] = ()
    held_out: tuple[str, ...] = ()
    rate_seed: int = 1000
    metric: str = "bbox/AP"


@dataclass(frozen=True)
class RegionMaking:
    """How the sweep makes region stores.

    Attributes:
        shards: tasks that share one store's work.
        arguments: further ones of ``tools/make_regions.py``.
    """

    shards: int = 1
    arguments: tuple[str, ...] = ("--workers", "1")


@dataclass(frozen=True)
class Sweep:
    """A sweep.

    Attributes:
        pretrain: by name.
        baselines: by name.
        finetune: by name.
        output_dir: for everything.
        name: of the sweep; empty: of its file.
        title: heading of the report; empty: the name.
        seeds: of pre-training and fine-tuning; a run of each start for each.
        images_seen: length of every pre-training in images; null: as its config says.
        pretrain_overrides: of all pre-trainings, after their own.
        finetune_overrides: of all fine-tunings, after their own.
        regions: how region stores are made.
        pictures: number of images per picture of the report; 0: no pictures.
    """

    pretrain: Mapping[str, Pretrain] = field(default_factory=dict)
    baselines: Mapping[str, Baseline] = field(default_factory=dict)
    finetune: Mapping[str, Finetune] = field(default_factory=dict)
    output_dir: str = ""
    name: str = ""
    title: str = ""
    seeds: tuple[int, ...] = (0,)
    images_seen: int | None = None
    pretrain_overrides: tuple[str, ...] = ()
    finetune_overrides: tuple[str, ...] = ()
    regions: RegionMaking = RegionMaking()
    pictures: int = 4

    def label(self, start: str) -> str:
        """What tables call a pre-training or a baseline."""
        entry = self.pretrain.get(start) or self.baselines[start]
        return entry.label or start


def load_sweep(path: str, overrides: Sequence[str] = ()) -> Sweep:
    """Load a sweep's file.

    Args:
        path: a lazy-config ``.py`` file with a dict called ``sweep``.
        overrides: ``sweep.key=value``, as for every config.

    Raises:
        UserError: no such file, no ``sweep`` in it, or a key or value that does not fit.
    """
    cfg = load_file(path)
    if not isinstance(cfg.get("sweep"), DictConfig):
        raise UserError(f"{path} has no dict called sweep: it is no sweep's file")
    # The keys that have a default can be set on the command line, whether the file has them or not.
    defaults = {f.name: _plain(_default(f)) for f in fields(Sweep)}
    given = OmegaConf.to_container(cfg.sweep, resolve=True)
    _refuse_unknown(given, Sweep, "sweep")
    whole = apply_overrides(OmegaConf.create({"sweep": defaults | given}), overrides)
    sweep = parse_sweep(OmegaConf.to_container(whole, resolve=True)["sweep"], Path(path).stem)
    return sweep


def parse_sweep(values: Mapping[str, Any], name: str) -> Sweep:
    """Check a sweep's values.

    Args:
        values: of the dict ``sweep``.
        name: of the sweep where the values have none.

    Raises:
        UserError: naming the key.
    """
    groups = {"pretrain": Pretrain, "baselines": Baseline, "finetune": Finetune}
    values = dict(values)
    for group, kind in groups.items():
        entries = values.get(group) or {}
        if not isinstance(entries, Mapping):
            raise UserError(f"sweep.{group} must be a dict of named entries")
        values[group] = {
            str(k): _build(kind, v, f"sweep.{group}.{k}")
            for k, v in entries.items()
            if v is not None  # taken away on the command line: sweep.pretrain.NAME=null
        }
    values["regions"] = _build(RegionMaking, values.get("regions") or {}, "sweep.regions")
    values["name"] = values.get("name") or name
    values["output_dir"] = values.get("output_dir") or f"output/sweeps/{values['name']}"
    sweep = _build(Sweep, values, "sweep")
    _check(sweep)
    return sweep


def _default(f: Any) -> Any:
    return f.default if f.default is not MISSING else f.default_factory()


def _plain(value: Any) -> Any:
    if isinstance(value, RegionMaking):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    return list(value) if isinstance(value, tuple) else value


def _refuse_unknown(values: Mapping[str, Any], kind: type, where: str) -> None:
    known = [f.name for f in fields(kind)]
    for key in values:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=3)
            hint = f"did you mean {', '.join(near)}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"no key {where}.{key} in a sweep; {hint}")


def _build(kind: type, values: Any, where: str) -> Any:
    if not isinstance(values, Mapping):
        raise UserError(f"{where}={values!r}: must be a dict")
    _refuse_unknown(values, kind, where)
    built = {}
    for f in fields(kind):
        if f.name not in values:
            if f.default is MISSING and f.default_factory is MISSING:
                raise UserError(f"{where} has no {f.name}")
            continue
        value = values[f.name]
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = tuple(value)
        elif str(f.type).startswith("tuple"):
            raise UserError(f"{where}.{f.name}={value!r}: must be a list")
        if str(f.type) in ("int", "int | None") and not (
            type(value) is int or value is None and "None" in str(f.type)
        ):
            raise UserError(f"{where}.{f.name}={value!r}: must be a whole number")
        for wanted in ("int", "float"):
            if str(f.type).startswith(f"tuple[{wanted}") and not all(map(_is_number, value)):
                raise UserError(f"{where}.{f.name}={list(value)}: must be a list of numbers")
        built[f.name] = value
    return kind(**built)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check(sweep: Sweep) -> None:
    starts = [*sweep.pretrain, *sweep.baselines]
    if not starts:
        raise UserError("the sweep has neither sweep.pretrain nor sweep.baselines")
    for name in [*starts, *sweep.finetune]:
        if not _NAME.fullmatch(name):
            raise UserError(f"{name!r} names folders: use letters, digits and . _ + - only")
    twice = set(sweep.pretrain) & set(sweep.baselines)
    if twice:
        raise UserError(f"sweep.pretrain and sweep.baselines both have {', '.join(sorted(twice))}")
    labels = [sweep.label(start) for start in starts]
    if len(set(labels)) != len(labels):
        raise UserError(f"two starts have the same label: {', '.join(labels)}")
    for key, values in [("sweep.seeds", sweep.seeds)] + [
        (f"sweep.finetune.{name}.{key}", getattr(entry, key))
        for name, entry in sweep.finetune.items()
        for key in ("fractions", "rates")
    ]:
        if len(set(values)) != len(values):
            raise UserError(f"{key}={list(values)}: the same value twice")
    if not sweep.seeds:
        raise UserError("sweep.seeds=[]: name one or more")
    if sweep.pictures < 0:
        raise UserError(f"sweep.pictures={sweep.pictures}: must be at least 0")
    if not sweep.regions.shards >= 1:
        raise UserError(f"sweep.regions.shards={sweep.regions.shards}: at least 1")
    for name, entry in sweep.finetune.items():
        _check_finetune(f"sweep.finetune.{name}", entry)


def _check_finetune(where: str, entry: Finetune) -> None:
    if not entry.fractions or not all(0 < f <= 1 for f in entry.fractions):
        raise UserError(f"{where}.fractions={list(entry.fractions)}: parts in (0, 1]")
    if not all(r > 0 for r in entry.rates):
        raise UserError(f"{where}.rates={list(entry.rates)}: learning rates above 0")
    if len(entry.rates) > 1 and not entry.held_out:
        raise UserError(
            f"{where} chooses among {len(entry.rates)} rates: {where}.held_out must say which "
            "split to choose on, e.g. ['dataloader.test.dataset.names=...'], not the results' own"
        )
    every = entry.checkpoints
    if every != FINAL and not (isinstance(every, int) and every > 0):
        raise UserError(f"{where}.checkpoints={every!r}: 'final', or a number of iterations")
    if not re.fullmatch(r"\w+/\w+", entry.metric):
        raise UserError(f"{where}.metric={entry.metric!r}: task/metric, e.g. bbox/AP")
