"""The main job from end to end, as its command lines: regions, pre-training, fine-tuning twice.

The same detector is fine-tuned on the same few labels from random weights and from the pre-trained
ones, with the same seed and schedule, each at the learning rate that suits its start.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.config import instantiate
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from tabulate import tabulate

from region_pretrain.config import load_config
from region_pretrain.engine.build import build_model
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.evaluation.knn_probe import KNNProbeHook
from region_pretrain.files import write_text_atomic
from region_pretrain.jobs.snapshot import in_checkout
from region_pretrain.metrics import read_results
from region_pretrain.reporting.environment import machine, versions
from region_pretrain.reporting.summary import mean_std
from region_pretrain.sweeps.demo_report import write_demo_report
from region_pretrain.sweeps.demo_tables import tables
from region_pretrain.sweeps.steps import Steps

#: Fine-tuning learning rates, the best of SWEEP_RATES for each start by box AP on a split that the
#: results do not use: ``python tools/demo.py --sweep`` prints the table.
SCRATCH_LR = 0.1
PRETRAINED_LR = 0.05
SWEEP_RATES = (0.025, 0.05, 0.1, 0.2)
#: Seed of the Shapes validation scenes of the sweep; those of the results have the config's.
SWEEP_VAL_SEED = 1000

STARTS = ("scratch", "pretrained")

#: ``quick``: the same job at a size that shows that it runs, and nothing else.
_QUICK_PRETRAIN = (
    "dataloader.train.dataset.names.size=24",
    "dataloader.train.total_batch_size=8",
    "dataloader.train.num_workers=0",
    "train.max_iter=4",
    "train.log_period=1",
)
_QUICK_DETECTION = (
    "dataloader.train.dataset.names.size=16",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.num_workers=0",
    "dataloader.test.dataset.names.size=8",
    "train.max_iter=4",
    "train.eval_period=2",
    "train.log_period=1",
)


@dataclass(frozen=True)
class Job:
    """What the demo runs.

    Attributes:
        pretrain_config: in the checkout; its data set is made by the config.
        detection_config: in the checkout, of the detector that the pre-training config borrows.
        output_dir: for everything.
        quick: the size for tests.
    """

    pretrain_config: str
    detection_config: str
    output_dir: str
    quick: bool = False

    @property
    def regions(self) -> str:
        """The region store."""
        return os.path.join(self.output_dir, "regions.arrow")

    def folder(self, seed: int, run: str) -> str:
        """Output folder of a training."""
        return os.path.join(self.output_dir, f"seed{seed}", run)

    def weights(self, seed: int, run: str) -> str:
        """Final checkpoint of a training."""
        return os.path.join(self.folder(seed, run), "model_final.pth")

    def pretrain_overrides(self, seed: int) -> list[str]:
        """Of the pre-training config."""
        return [
            f"dataloader.train.dataset.regions={self.regions}",
            f"train.seed={seed}",
            "train.device=cpu",
            f"train.output_dir={self.folder(seed, 'pretrain')}",
            *(_QUICK_PRETRAIN if self.quick else ()),
        ]

    def detection_overrides(self, seed: int, start: str, lr: float, folder: str) -> list[str]:
        """Of the detection config."""
        init = [f"train.init_checkpoint={self.weights(seed, 'pretrain')}"]
        return [
            *(init if start == "pretrained" else []),
            f"optimizer.lr={lr:g}",
            f"train.seed={seed}",
            "train.device=cpu",
            f"train.output_dir={folder}",
            *(_QUICK_DETECTION if self.quick else ()),
        ]

    def load(self, config: str, overrides: Sequence[str]) -> DictConfig:
        """A config as the tools load it."""
        return load_config(in_checkout(config), overrides)


def run_demo(
    pretrain_config: str,
    detection_config: str,
    output_dir: str = "output/demo",
    seeds: Sequence[int] = (0,),
    lr_scratch: float = SCRATCH_LR,
    lr_pretrained: float = PRETRAINED_LR,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Run the job for each seed, and write ``results.json`` and ``report.html``.

    Args:
        pretrain_config: path in the checkout.
        detection_config: path in the checkout.
        output_dir: steps that are finished in it are not run again.
        seeds: of pre-training and of both fine-tunings.
        lr_scratch: fine-tuning learning rate from random weights.
        lr_pretrained: fine-tuning learning rate from the pre-trained weights.
        quick: a size that shows that it runs, and nothing else.
        say: takes the lines that a person shall see.

    Returns:
        What is in ``results.json``.

    Raises:
        UserError: a step failed; the message names its log.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UserError(f"--seeds {' '.join(map(str, seeds))}: name one or more different seeds")
    job = Job(pretrain_config, detection_config, output_dir, quick)
    rates = {"scratch": lr_scratch, "pretrained": lr_pretrained}
    steps = Steps(output_dir, say)
    setup_logger(name="region_pretrain", output=os.path.join(output_dir, "logs", "demo.txt"))
    logging.getLogger("region_pretrain").handlers[0].setLevel(logging.WARNING)  # the console

    names = [_make_regions(steps, job)]
    by_seed = {}
    for seed in seeds:
        mine = [_pretrain(steps, job, seed)]
        mine += [_fine_tune(steps, job, seed, start, rates[start]) for start in STARTS]
        names += mine
        by_seed[str(seed)] = {
            "finetuning": {s: read_results(job.folder(seed, s)) for s in STARTS},
            "knn": _knn(job, seed),
            "minutes": {n.rsplit(" seed", 1)[0]: steps.minutes(n) for n in mine},
        }
    results = {
        "quick": quick,
        "seeds": list(seeds),
        "learning_rates": rates,
        "by_seed": by_seed,
        "summary": summarise(by_seed),
        "minutes": {name: steps.minutes(name) for name in names},
        "commands": {name: steps.command(name) for name in names},
        "versions": versions(),
        "machine": machine(),
    }
    path = os.path.join(output_dir, "results.json")
    write_text_atomic(path, json.dumps(results, indent=2) + "\n")
    report = os.path.join(output_dir, "report.html")
    write_demo_report(report, job, results)
    for title, header, rows in tables(results):
        align = ["left", *["right"] * (len(header) - 1)]
        say(f"\n{title}\n{tabulate(rows, header, disable_numparse=True, colalign=align)}")
    say(f"\nnumbers: {path}\nreport:  {report}")
    return results


def run_sweep(
    pretrain_config: str,
    detection_config: str,
    output_dir: str = "output/demo",
    seed: int = 0,
    rates: Sequence[float] = SWEEP_RATES,
    quick: bool = False,
    say: Callable[[str], None] = print,
) -> dict[str, dict[str, dict[str, Any]]]:
    """Fine-tune both starts at several learning rates; evaluate on scenes of their own.

    Args:
        pretrain_config, detection_config, output_dir, quick, say: as for :func:`run_demo`, whose
            regions and pre-training are used where they are there.
        seed: of pre-training and fine-tuning.
        rates: learning rates.

    Returns:
        start -> learning rate -> results of the run; also in ``sweep.json``.

    Raises:
        UserError: a step failed; the message names its log.
    """
    job = Job(pretrain_config, detection_config, output_dir, quick)
    steps = Steps(output_dir, say)
    _make_regions(steps, job)
    _pretrain(steps, job, seed)
    found: dict[str, dict[str, dict[str, Any]]] = {start: {} for start in STARTS}
    for lr in rates:
        for start in STARTS:
            folder = job.folder(seed, f"sweep_{start}_lr{lr:g}")
            more = [f"+dataloader.test.dataset.names.seed={SWEEP_VAL_SEED}", "train.eval_period=0"]
            _fine_tune(steps, job, seed, start, lr, folder, more)
            found[start][f"{lr:g}"] = read_results(folder)
    write_text_atomic(os.path.join(output_dir, "sweep.json"), json.dumps(found, indent=2) + "\n")
    header = ["learning rate", *(f"{s}, {k} AP" for s in STARTS for k in ("box", "mask"))]
    rows = [
        [lr, *(found[s][lr].get(t, {}).get("AP") for s in STARTS for t in ("bbox", "segm"))]
        for lr in (f"{lr:g}" for lr in rates)
    ]
    say(f"\n{tabulate(rows, header, floatfmt='.1f', missingval='-', disable_numparse=[0])}")
    for start in STARTS:
        best = max(found[start], key=lambda lr, s=start: found[s][lr]["bbox"]["AP"] or 0.0)
        say(f"best for {start}: {best}")
    return found


def _make_regions(steps: Steps, job: Job) -> str:
    quick = [o for o in _QUICK_PRETRAIN if o.startswith("dataloader.train.dataset.")]
    arguments = ["--config-file", in_checkout(job.pretrain_config), "--out", job.regions]
    arguments += quick if job.quick else []
    steps.run("regions", "tools/make_regions.py", arguments, job.regions)
    return "regions"


def _pretrain(steps: Steps, job: Job, seed: int) -> str:
    name, folder = f"pretrain seed{seed}", job.folder(seed, "pretrain")
    arguments = ["--config-file", in_checkout(job.pretrain_config), *job.pretrain_overrides(seed)]
    steps.run(name, "tools/pretrain_net.py", arguments, job.weights(seed, "pretrain"), folder)
    return name


def _fine_tune(
    steps: Steps,
    job: Job,
    seed: int,
    start: str,
    lr: float,
    folder: str | None = None,
    more: Sequence[str] = (),
) -> str:
    folder = folder or job.folder(seed, start)
    name = f"{os.path.basename(folder)} seed{seed}"
    overrides = [*job.detection_overrides(seed, start, lr, folder), *more]
    arguments = ["--config-file", in_checkout(job.detection_config), *overrides]
    product = os.path.join(folder, "results.json")
    steps.run(name, "tools/train_net.py", arguments, product, folder)
    return name


def _knn(job: Job, seed: int) -> dict[str, dict[str, float]]:
    """kNN accuracy in percent of the validation boxes by the labelled training boxes.

    Returns:
        ``"random"`` (the pre-training's model before its first step) and ``"pretrained"`` ->
        name of the features -> percent.
    """
    detection = job.load(job.detection_config, job.detection_overrides(seed, "scratch", 0.0, ""))
    train, val = (instantiate(detection.dataloader[s].dataset.names) for s in ("train", "test"))
    probe = KNNProbeHook(0, train, val, short_edge=None)
    probe.before_train()
    cfg = job.load(job.pretrain_config, job.pretrain_overrides(seed))
    model = build_model(cfg, torch.device("cpu"))
    found = {"random": probe.probe(model)}
    load_pretrained(model, job.weights(seed, "pretrain"))
    found["pretrained"] = probe.probe(model)
    return {
        which: {name.removeprefix("probe/knn_"): 100 * value for name, value in values.items()}
        for which, values in found.items()
    }


def summarise(by_seed: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, dict[str, Any]]]:
    """Mean and sample standard deviation over the seeds, of each start and of their difference.

    Args:
        by_seed: seed -> ``finetuning`` and ``knn``.

    Returns:
        Metric (``bbox/AP``, ``knn/fpn``, ...) -> start or ``difference`` -> ``mean`` and ``std``,
        null where a seed has no value, and ``std`` null for a single seed.
    """

    def values(seed: Mapping[str, Any]) -> dict[str, tuple[float | None, float | None]]:
        tuned = [seed["finetuning"][start] for start in STARTS]
        random, learnt = seed["knn"]["random"], seed["knn"]["pretrained"]
        found = {
            # A detector that finds nothing at all has no entry for masks.
            f"{task}/{metric}": tuple(start.get(task, {}).get(metric) for start in tuned)
            for task in ("bbox", "segm")
            for metric in ("AP", "AP50")
        }
        return found | {f"knn/{name}": (random[name], learnt[name]) for name in random}

    each = [values(seed) for seed in by_seed.values()]
    summary: dict[str, dict[str, dict[str, Any]]] = {}
    for metric in each[0]:
        pairs = [v[metric] for v in each]
        whole = all(None not in pair for pair in pairs)
        columns = {
            "scratch": [a for a, _ in pairs],
            "pretrained": [b for _, b in pairs],
            "difference": [b - a for a, b in pairs] if whole else [None],
        }
        summary[metric] = {name: mean_std(column) for name, column in columns.items()}
    return summary
