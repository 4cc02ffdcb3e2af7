"""From a sweep's definition to its graph of runs; identical runs appear once."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import instantiate

from region_pretrain.convert.recognise import check_weights
from region_pretrain.engine import checkpoint
from region_pretrain.errors import UserError
from region_pretrain.sweeps.configs import (
    check_split,
    check_transfer,
    checked_config,
    content,
    for_jobs,
)
from region_pretrain.sweeps.definition import FINAL, Finetune, Sweep
from region_pretrain.sweeps.graph import (
    CHOICE,
    CONFIG,
    FINETUNE,
    PRETRAIN,
    REGIONS,
    TRIAL,
    Plan,
    Run,
)
from region_pretrain.tracking.service import SERVICES

CHOICE_FILE = "chosen_learning_rate.txt"
_FINAL_CHECKPOINT = f"{checkpoint.FINAL}.pth"
_DATASET = "dataloader.train.dataset"
#: Options of ``tools/make_regions.py``, with a value each, that do not affect the boxes.
_HARMLESS = ("--workers", "--max-unreadable", "--part-size", "--preview")
_WORKERS = ("--workers", "1")  # the default; always in a run's id, as it has been


def make_plan(sweep: Sweep) -> Plan:
    """Plan all runs of a sweep. Every config is loaded with its overrides and built.

    Raises:
        UserError: a config does not build, or a value of the sweep does not fit its configs.
    """
    return _Planner(sweep).plan()


class _Planner:
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._plan = Plan()
        self._pretrainings: dict[tuple[str, int], Run] = {}

    def plan(self) -> Plan:
        sweep = self._sweep
        for entry in sweep.finetune.values():  # a wrong config fails before the slower checks
            checked_config(entry.config, (*entry.overrides, *sweep.finetune_overrides), True)
        for seed in sweep.seeds:
            for init in sweep.pretrain:
                self._pretrain(init, seed)
        for name, entry in sweep.finetune.items():
            for init in [*sweep.baselines, *sweep.pretrain]:
                for fraction in entry.label_fractions:
                    for at in self._checkpoints(entry, init):
                        self._finetune(name, init, fraction, at)
        return self._plan

    def _add(
        self,
        kind: str,
        name: str,
        tool: str,
        what: Any,
        product: str,
        tasks: Callable[[str], Sequence[Sequence[str]]],
        parents: Sequence[Run] = (),
        **labels: Any,
    ) -> Run:
        """Add a run, unless the plan has one that computes the same.

        Args:
            what: everything that determines the result, besides tool and parents.
            product: file in the run's folder.
            tasks: maps the folder to the arguments of each command line.
            labels: the entry's remaining keys.
        """
        facts = json.dumps([tool, what, sorted(p.id for p in parents)])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
        entry = {"kind": kind, **labels, "run": digest}
        runs = self._plan.runs
        if entry not in self._plan.entries:  # a run is added once for each run that needs it
            self._plan.entries.append(entry)
        if digest not in runs:
            if name in (run.name for run in runs.values()):
                raise UserError(f"two different runs are called {name}: rename an entry of sweep")
            base = os.path.join(os.path.abspath(self._sweep.output_dir), "runs")
            # A run keeps its folder when a name in the sweep file changes.
            existing = glob.glob(os.path.join(glob.escape(base), f"*-{digest}"))
            folder = existing[0] if existing else os.path.join(base, f"{name}-{digest}")
            runs[digest] = Run(
                digest,
                kind,
                name,
                tool,
                tuple(tuple(task) for task in tasks(folder)),
                folder,
                os.path.join(folder, product),
                tuple(dict.fromkeys(p.id for p in parents)),
            )
        return runs[digest]

    def _regions(self, init: str, overrides: Sequence[str]) -> Run | None:
        """The run that generates a pre-training's regions; None if its config needs none."""
        entry, generation = self._sweep.pretrain[init], self._sweep.regions
        cfg = checked_config(entry.config, tuple(overrides), False)
        dataset = cfg.dataloader.train.get("dataset", {})
        if dataset.get("regions") is None:
            return None
        names = instantiate(dataset.names)
        # The tool reads only the data set from its config, and what registers it.
        data = [o for o in overrides if o.lstrip("+").startswith(f"{_DATASET}.")]
        data += _registering(cfg)

        def tasks(folder: str) -> list[list[str]]:
            common = [CONFIG, for_jobs(entry.config), *generation.arguments]
            common += ["--out", os.path.join(folder, "regions.arrow")]
            if generation.shards == 1:
                return [[*common, *data]]
            shards = (f"{i}/{generation.shards}" for i in range(generation.shards))
            return [[*common, "--shard", shard, *data] for shard in shards]

        return self._add(
            REGIONS,
            f"regions_{init}",
            "tools/make_regions.py",
            [
                names if isinstance(names, str) else list(names),
                dataset.get("recipe"),
                [*_WORKERS, *_that_matter(generation.arguments)],
            ],
            "regions.arrow",
            tasks,
            init=init,
        )

    def _pretrain_overrides(self, init: str) -> list[str]:
        """A pre-training's overrides without seed and regions."""
        sweep, entry = self._sweep, self._sweep.pretrain[init]
        overrides = [*entry.overrides, *sweep.pretrain_overrides]
        name, images = (
            ("sweep.images_seen", sweep.images_seen)
            if entry.images_seen is None
            else (f"sweep.pretrain.{init}.images_seen", entry.images_seen)
        )
        if images is not None:
            cfg = checked_config(entry.config, tuple(overrides), False)
            batch = cfg.dataloader.train.total_batch_size
            if images % batch:
                raise UserError(
                    f"{name}={images} is not a multiple of the batch size of {init}, {batch}: "
                    "the pre-trainings would differ in length"
                )
            overrides.append(f"train.max_iter={images // batch}")
        periods = {e.checkpoints for e in sweep.finetune.values() if e.checkpoints != FINAL}
        return [*overrides, *(f"train.checkpoint_keep_every={k}" for k in periods)]

    def _pretrain(self, init: str, seed: int) -> Run:
        if (init, seed) not in self._pretrainings:
            self._pretrainings[init, seed] = self._add_pretraining(init, seed)
        return self._pretrainings[init, seed]

    def _add_pretraining(self, init: str, seed: int) -> Run:
        entry = self._sweep.pretrain[init]
        overrides = [*self._pretrain_overrides(init), f"train.seed={seed}"]
        regions = self._regions(init, overrides) if entry.regions is None else None
        store = regions.product if regions else entry.regions
        if store is not None:
            overrides.append(f"{_DATASET}.regions={store}")
            if regions is None and not os.path.exists(store):
                raise UserError(f"sweep.pretrain.{init}.regions={store}: no such file")
        start = self._pretrain(entry.init_from, seed) if entry.init_from else None
        if start is not None:
            overrides.append(f"train.init_checkpoint={start.product}")
        cfg = checked_config(entry.config, tuple(overrides), False)
        # The parents identify what the sweep generates; its paths do not matter.
        without = [f"{_DATASET}.regions"] if regions else []
        without += ["train.init_checkpoint"] if start else []
        return self._add(
            PRETRAIN,
            f"{init}_seed{seed}",
            "tools/pretrain_net.py",
            content(cfg, without),
            _FINAL_CHECKPOINT,
            lambda folder: [_command(entry.config, [*overrides, *self._apart(cfg)], folder)],
            [run for run in (regions, start) if run is not None],
            init=init,
            seed=seed,
        )

    def _apart(self, cfg: Any) -> list[str]:
        """Overrides that a job needs and that do not affect what it computes.

        They name the sweep as the group of the run in trackers, and the code that registers data.
        """
        tracked = any(name in cfg.train.writers for name in SERVICES)
        own = cfg.train.tracking.group is not None
        name = json.dumps(self._sweep.name, ensure_ascii=False)  # quoted, as it may be any text
        group = [f"train.tracking.group={name}"] if tracked and not own else []
        return [*group, *_registering(cfg)]

    def _checkpoints(self, entry: Finetune, init: str) -> list[str | int]:
        """The checkpoints to fine-tune: numbers of iterations, and ``"final"`` at the end."""
        if entry.checkpoints == FINAL or init in self._sweep.baselines:
            return [FINAL]
        overrides = tuple(self._pretrain_overrides(init))
        max_iter = checked_config(
            self._sweep.pretrain[init].config, overrides, False
        ).train.max_iter
        if max_iter is None:
            raise UserError(
                f"checkpoints={entry.checkpoints} needs the number of pre-training iterations: "
                f"set sweep.images_seen, or train.max_iter of {init}"
            )
        return [*range(entry.checkpoints, max_iter, entry.checkpoints), FINAL]

    def _finetune(self, name: str, init: str, fraction: float, at: str | int) -> None:
        """Add all runs of one row of the results: trials, choice, and the fine-tunings."""
        entry = self._sweep.finetune[name]
        labels = {"init": init, "finetune": name, "label_fraction": fraction, "checkpoint": at}
        words = [name] if len(self._sweep.finetune) > 1 else []
        words.append(init)
        words += [f"labels{fraction:g}"] if fraction < 1 else []
        words += [f"at{at}"] if at != FINAL else []
        slug = "_".join(words)
        choice = self._choice(slug, labels) if len(entry.learning_rates) > 1 else None
        rates = [] if choice else [f"optimizer.lr={rate:g}" for rate in entry.learning_rates]
        own, pretrained = self._sweep.seeds, init in self._sweep.pretrain
        seeds = [(p, f) for p in (own if pretrained else [None]) for f in entry.seeds]
        for pretrain, seed in seeds or zip(own, own, strict=True):
            words = [slug, *([] if pretrain is None else [f"seed{pretrain}"]), "det"]
            words += [f"seed{seed}"] if entry.seeds else []
            mine = {**labels, "seed": seed, **({"pretrain_seed": pretrain} if pretrained else {})}
            self._train(FINETUNE, "_".join(words), mine, rates, choice)

    def _choice(self, slug: str, labels: Mapping[str, Any]) -> Run:
        """The run that chooses a learning rate, after its trials."""
        entry, own = self._sweep.finetune[labels["finetune"]], self._sweep.seeds
        self._check_held_out(labels["finetune"], labels["init"])
        seeds, trials = entry.learning_rate_seeds, []
        for rate in entry.learning_rates:
            for i, seed in enumerate(seeds):
                mine = {**labels, "seed": seed, "learning_rate": rate, "metric": entry.metric}
                if labels["init"] in self._sweep.pretrain:
                    mine["pretrain_seed"] = own[i % len(own)]
                name = f"{slug}_lr{rate:g}" + (f"_seed{seed}" if len(seeds) > 1 else "")
                more = [*entry.held_out, f"optimizer.lr={rate:g}", "train.diverged_is_result=true"]
                trials.append((rate, self._train(TRIAL, name, mine, more)))

        def tasks(folder: str) -> list[list[str]]:
            pairs = [f"{rate:g}={run.product}" for rate, run in trials]
            out = ["--out", os.path.join(folder, CHOICE_FILE)]
            return [["choose", "--metric", entry.metric, *out, *pairs]]

        return self._add(
            CHOICE,
            f"{slug}_choice",
            "tools/sweep.py",
            [entry.metric, [[rate, run.id] for rate, run in trials]],
            CHOICE_FILE,
            tasks,
            [run for _, run in trials],
            **labels,
        )

    def _check_held_out(self, name: str, init: str) -> None:
        """The trials must not be evaluated on the data of the results."""
        sweep, entry = self._sweep, self._sweep.finetune[name]
        own = (sweep.pretrain | sweep.baselines)[init].finetune_overrides
        overrides = (*entry.overrides, *sweep.finetune_overrides, *own)
        results, trials = (
            checked_config(entry.config, (*overrides, *more), True).dataloader.test
            for more in ((), entry.held_out)
        )
        if results.get("dataset", results) == trials.get("dataset", trials):
            raise UserError(
                f"sweep.finetune.{name}.held_out={entry.held_out}: the trials would be evaluated "
                "on the data of the results; name another split, e.g. "
                "['dataloader.test.dataset.names=...']"
            )

    def _train(
        self,
        kind: str,
        name: str,
        labels: Mapping[str, Any],
        more: Sequence[str],
        choice: Run | None = None,
    ) -> Run:
        """Add one fine-tuning.

        Args:
            labels: the entry's keys.
            more: further overrides.
            choice: the run that chooses its learning rate.
        """
        sweep, init = self._sweep, labels["init"]
        entry, source = sweep.finetune[labels["finetune"]], (sweep.pretrain | sweep.baselines)[init]
        parents = [choice] if choice else []
        if init in self._sweep.pretrain:
            pretrain, at = self._pretrain(init, labels["pretrain_seed"]), labels["checkpoint"]
            parents.append(pretrain)
            file = _FINAL_CHECKPOINT if at == FINAL else f"{checkpoint.checkpoint_name(at - 1)}.pth"
            weights = os.path.join(pretrain.folder, file)
            without = ["train.init_checkpoint"]  # parent and checkpoint identify the weights
        else:
            weights, without = self._sweep.baselines[init].init_checkpoint, []
            check_weights(weights, f"sweep.baselines.{init}.init_checkpoint: ")
        fraction, seed = labels["label_fraction"], labels["seed"]
        if entry.label_split and fraction < 1:
            check_split(f"sweep.finetune.{labels['finetune']}", entry.label_split, fraction, seed)
        subset = [
            f"{_DATASET}._target_=region_pretrain.data.few_label."
            + ("listed_images" if entry.label_split else "random_fraction"),
            f"+{_DATASET}.fraction={fraction:g}",
            f"+{_DATASET}.seed={seed}",
            *([f"+{_DATASET}.split={entry.label_split}"] if entry.label_split else []),
        ]
        named = [f"train.init_checkpoint={weights}"]
        overrides = [
            *([] if weights else named),  # instead of those that the config has
            *entry.overrides,
            *self._sweep.finetune_overrides,
            *source.finetune_overrides,
            *(named if weights else []),
            *(subset if fraction < 1 else []),
            f"train.seed={seed}",
            *more,
        ]
        cfg = checked_config(entry.config, tuple(overrides), True)
        if init in self._sweep.pretrain:
            weights_of = sweep.pretrain[init].config, tuple(self._pretrain_overrides(init))
            check_transfer(entry.config, tuple(overrides), weights_of)
        elif not cfg.train.init_checkpoint:
            try:
                check_transfer(entry.config, tuple(overrides), None)
            except UserError as error:
                raise UserError(
                    f"sweep.baselines.{init} has no init_checkpoint, and {error}; the overrides "
                    f"belong into sweep.baselines.{init}.finetune_overrides"
                ) from None
        chosen = [f"@{choice.product}"] if choice else []
        return self._add(
            kind,
            name,
            "tools/train_net.py",
            [content(cfg, without), labels["checkpoint"]],
            "results.json",
            lambda folder: [
                [*_command(entry.config, [*overrides, *self._apart(cfg)], folder), *chosen]
            ],
            parents,
            **labels,
        )


def _that_matter(arguments: Sequence[str]) -> list[str]:
    """The arguments of a region search that affect its boxes."""
    words, kept = iter(arguments), []
    for word in words:
        if word in _HARMLESS:
            next(words, None)
        elif not word.startswith(tuple(f"{option}=" for option in _HARMLESS)):
            kept.append(word)
    return kept


def _registering(cfg: Any) -> list[str]:
    """The override that names all code that registers data sets: also what the sweep file did."""
    entries = list(cfg.train.register)
    return [f"train.register={json.dumps(entries, ensure_ascii=False)}"] if entries else []


def _command(config: str, overrides: Sequence[str], folder: str) -> list[str]:
    return [CONFIG, for_jobs(config), *overrides, f"train.output_dir={folder}"]
