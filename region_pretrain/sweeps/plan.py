"""From a sweep to its runs: a graph of command lines in which each one is there once."""

from __future__ import annotations

import glob
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from detectron2.config import instantiate
from omegaconf import DictConfig

from region_pretrain.engine import checkpoint
from region_pretrain.errors import UserError
from region_pretrain.sweeps.configs import checked_config, content
from region_pretrain.sweeps.definition import FINAL, Finetune, Sweep
from region_pretrain.sweeps.graph import (
    CHOICE,
    FINETUNE,
    PRETRAIN,
    REGIONS,
    TRIAL,
    Plan,
    Run,
)

CHOICE_FILE = "chosen_rate.txt"
_FINAL_CHECKPOINT = f"{checkpoint.FINAL}.pth"


def make_plan(sweep: Sweep) -> Plan:
    """All runs of a sweep.

    Every config is loaded with its overrides and built on the way.

    Raises:
        UserError: naming the config that does not build, or the value that does not fit.
    """
    return _Planner(sweep).plan()


class _Planner:
    def __init__(self, sweep: Sweep) -> None:
        self._sweep = sweep
        self._plan = Plan()
        self._names: set[str] = set()
        self._pretrained: dict[tuple[str, int], Run] = {}

    def plan(self) -> Plan:
        sweep = self._sweep
        for name in sweep.finetune:
            self._detection(name, ())  # a config that is wrong is named before others are tried
        for seed in sweep.seeds:
            for start in sweep.pretrain:
                self._pretrain(start, seed)
        for name, entry in sweep.finetune.items():
            for start in [*sweep.baselines, *sweep.pretrain]:
                for fraction in entry.fractions:
                    for at in self._checkpoints(entry, start):
                        self._finetune(name, start, fraction, at)
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
        """A run, or the one that does the same already.

        Args:
            what: all that decides what is computed, but for the parents.
            product: file in the run's folder.
            tasks: the folder -> arguments.
        """
        facts = json.dumps([tool, what, sorted(p.id for p in parents)])
        digest = hashlib.sha256(facts.encode()).hexdigest()[:12]
        entry = {"kind": kind, **labels, "run": digest}
        if entry not in self._plan.entries:  # several runs may need one and the same
            self._plan.entries.append(entry)
        if digest in self._plan.runs:
            return self._plan.runs[digest]
        if name in self._names:
            raise UserError(f"two different runs of the sweep would be called {name}")
        self._names.add(name)
        base = os.path.join(os.path.abspath(self._sweep.output_dir), "runs")
        # A run keeps its folder when a name in the sweep's file changes.
        before = glob.glob(os.path.join(glob.escape(base), f"*-{digest}"))
        folder = before[0] if before else os.path.join(base, f"{name}-{digest}")
        run = Run(
            digest,
            kind,
            name,
            tool,
            tuple(tuple(task) for task in tasks(folder)),
            folder,
            os.path.join(folder, product),
            tuple(dict.fromkeys(p.id for p in parents)),
        )
        self._plan.runs[digest] = run
        return run

    def _regions(self, start: str, overrides: Sequence[str]) -> Run | None:
        """The run that makes what a pre-training's config asks for; None where it asks for none."""
        entry, making = self._sweep.pretrain[start], self._sweep.regions
        cfg = checked_config(entry.config, tuple(overrides), False)
        dataset = cfg.dataloader.train.get("dataset", {})
        if dataset.get("regions") is None:
            return None
        what = [instantiate(dataset.names), dataset.get("recipe"), list(making.arguments)]
        # Overrides of the data set are all that the tool reads of them.
        data = [o for o in overrides if o.lstrip("+").startswith("dataloader.train.dataset.")]

        def tasks(folder: str) -> list[list[str]]:
            common = ["--config-file", entry.config, *making.arguments]
            common += ["--out", os.path.join(folder, "regions.arrow")]
            shards = [["--shard", f"{i}/{making.shards}"] for i in range(making.shards)]
            return [[*common, *(s if making.shards > 1 else []), *data] for s in shards]

        return self._add(
            REGIONS,
            f"regions_{start}",
            "tools/make_regions.py",
            what,
            "regions.arrow",
            tasks,
            init=start,
        )

    def _length(self, start: str) -> list[str]:
        """The override that makes a pre-training see ``images_seen`` images."""
        sweep = self._sweep
        if sweep.images_seen is None:
            return []
        overrides = (*sweep.pretrain[start].overrides, *sweep.pretrain_overrides)
        cfg = checked_config(sweep.pretrain[start].config, overrides, False)
        batch = cfg.dataloader.train.total_batch_size
        if sweep.images_seen % batch:
            raise UserError(
                f"sweep.images_seen={sweep.images_seen} is no multiple of the batch of {start}, "
                f"{batch} images: the pre-trainings would differ in length"
            )
        return [f"train.max_iter={sweep.images_seen // batch}"]

    def _pretrain_overrides(self, start: str) -> list[str]:
        sweep = self._sweep
        every = {e.checkpoints for e in sweep.finetune.values() if e.checkpoints != FINAL}
        if len(every) > 1:
            raise UserError(f"the fine-tunings want checkpoints of different steps: {every}")
        return [
            *sweep.pretrain[start].overrides,
            *sweep.pretrain_overrides,
            *self._length(start),
            *(f"train.checkpointer.keep_every={k}" for k in every),
        ]

    def _pretrain(self, start: str, seed: int) -> Run:
        if (start, seed) not in self._pretrained:
            self._pretrained[start, seed] = self._new_pretrain(start, seed)
        return self._pretrained[start, seed]

    def _new_pretrain(self, start: str, seed: int) -> Run:
        entry = self._sweep.pretrain[start]
        overrides = [*self._pretrain_overrides(start), f"train.seed={seed}"]
        regions = self._regions(start, overrides) if entry.regions is None else None
        store = regions.product if regions else entry.regions
        if store is not None:
            overrides.append(f"dataloader.train.dataset.regions={store}")
            if regions is None and not os.path.exists(store):
                raise UserError(f"sweep.pretrain.{start}.regions={store}: there is no such file")
        cfg = checked_config(entry.config, tuple(overrides), False)
        # A store that the sweep makes is told by the parent.
        made = ["dataloader.train.dataset.regions"] if regions else []

        def tasks(folder: str) -> list[list[str]]:
            return [_command(entry.config, overrides, folder)]

        return self._add(
            PRETRAIN,
            f"{start}_seed{seed}",
            "tools/pretrain_net.py",
            content(cfg, made),
            _FINAL_CHECKPOINT,
            tasks,
            [regions] if regions else [],
            init=start,
            seed=seed,
        )

    def _checkpoints(self, entry: Finetune, start: str) -> list[str | int]:
        """``"final"``, or numbers of iterations of which the last is the final checkpoint."""
        if entry.checkpoints == FINAL or start in self._sweep.baselines:
            return [FINAL]
        overrides = self._pretrain_overrides(start)
        cfg = checked_config(self._sweep.pretrain[start].config, tuple(overrides), False)
        if cfg.train.max_iter is None:
            raise UserError(
                f"checkpoints={entry.checkpoints}: set sweep.images_seen or {start}'s "
                "train.max_iter, so that it is known which checkpoints there will be"
            )
        return [*range(entry.checkpoints, cfg.train.max_iter, entry.checkpoints), FINAL]

    def _detection(self, name: str, more: Sequence[str]) -> tuple[list[str], DictConfig]:
        entry = self._sweep.finetune[name]
        overrides = [*entry.overrides, *self._sweep.finetune_overrides, *more]
        return overrides, checked_config(entry.config, tuple(overrides), True)

    def _finetune(self, name: str, start: str, fraction: float, at: str | int) -> None:
        """All the runs of one row of the table: trials, the choice, one run a seed."""
        entry = self._sweep.finetune[name]
        one = len(self._sweep.finetune) == 1
        labels = {"init": start, "finetune": name, "label_fraction": fraction, "checkpoint": at}
        slug = "_".join(
            [
                *([] if one else [name]),
                start,
                *([] if fraction == 1 else [f"labels{fraction:g}"]),
                *([] if at == FINAL else [f"at{at}"]),
            ]
        )
        choice = None
        if len(entry.rates) > 1:
            choice = self._choice(name, slug, labels)
        for seed in self._sweep.seeds:
            rate = [f"optimizer.lr={r:g}" for r in entry.rates if choice is None]
            found = [f"@{choice.product}"] if choice else rate
            more = self._start(labels, seed, seed)
            self._train(
                FINETUNE,
                f"{slug}_seed{seed}_det",
                name,
                more,
                found,
                [choice] if choice else [],
                labels | {"seed": seed},
            )

    def _choice(self, name: str, slug: str, labels: Mapping[str, Any]) -> Run:
        entry, sweep = self._sweep.finetune[name], self._sweep
        trials = {}
        for rate in entry.rates:
            more = self._start(labels, sweep.seeds[0], entry.rate_seed)
            trials[rate] = self._train(
                TRIAL,
                f"{slug}_rate{rate:g}",
                name,
                [*more, *entry.held_out],
                [f"optimizer.lr={rate:g}"],
                [],
                labels | {"seed": entry.rate_seed, "learning_rate": rate, "metric": entry.metric},
            )

        def tasks(folder: str) -> list[list[str]]:
            pairs = [f"{rate:g}={run.product}" for rate, run in trials.items()]
            out = ["--out", os.path.join(folder, CHOICE_FILE)]
            return [["choose", "--metric", entry.metric, *out, *pairs]]

        return self._add(
            CHOICE,
            f"{slug}_choice",
            "tools/sweep.py",
            [entry.metric, [[rate, run.id] for rate, run in trials.items()]],
            CHOICE_FILE,
            tasks,
            list(trials.values()),
            **labels,
        )

    def _start(self, labels: Mapping[str, Any], pretrain_seed: int, seed: int) -> list[str]:
        """Overrides of a fine-tuning: its weights, its part of the labels, its seed."""
        start, fraction, at = labels["init"], labels["label_fraction"], labels["checkpoint"]
        if start in self._sweep.baselines:
            init = self._sweep.baselines[start]
            weights = init.init_checkpoint
        else:
            init = self._sweep.pretrain[start]
            file = _FINAL_CHECKPOINT if at == FINAL else f"{checkpoint.checkpoint_name(at - 1)}.pth"
            weights = os.path.join(self._pretrain(start, pretrain_seed).folder, file)
        dataset = "dataloader.train.dataset"
        few = [
            f"{dataset}._target_=region_pretrain.data.few_label.random_fraction",
            f"+{dataset}.fraction={fraction:g}",
            f"+{dataset}.seed={seed}",
        ]
        return [
            *init.finetune_overrides,
            *([f"train.init_checkpoint={weights}"] if weights else []),
            *(few if fraction < 1 else []),
            f"train.seed={seed}",
        ]

    def _train(
        self,
        kind: str,
        run_name: str,
        name: str,
        more: Sequence[str],
        rate: Sequence[str],
        parents: Sequence[Run],
        labels: Mapping[str, Any],
    ) -> Run:
        """A fine-tuning. ``rate`` is an override, or ``@FILE`` that will hold one."""
        known = [r for r in rate if not r.startswith("@")]
        overrides, cfg = self._detection(name, [*more, *known])
        start = labels["init"]
        own = start not in self._sweep.pretrain
        what = [content(cfg, [] if own else ["train.init_checkpoint"]), labels["checkpoint"]]
        if not own:  # its parent says from which weights
            folder = os.path.dirname(cfg.train.init_checkpoint)
            parents = [*parents, next(r for r in self._plan.runs.values() if r.folder == folder)]
        config = self._sweep.finetune[name].config
        late = [r for r in rate if r.startswith("@")]

        def tasks(folder: str) -> list[list[str]]:
            return [[*_command(config, overrides, folder), *late]]

        return self._add(
            kind, run_name, "tools/train_net.py", what, "results.json", tasks, parents, **labels
        )


def _command(config: str, overrides: Sequence[str], folder: str) -> list[str]:
    return ["--config-file", config, *overrides, f"train.output_dir={folder}"]
