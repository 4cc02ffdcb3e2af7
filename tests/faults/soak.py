"""Kill tiny runs of all methods at random moments, resume them, and compare with unkilled runs.

    make soak KILLS=200 STEPS=20000 SEED=1

Then train for many steps, and check that memory, descriptors and threads do not grow.
"""

# ruff: noqa: E402
from __future__ import annotations

import sys
from pathlib import Path

TESTS = Path(__file__).parents[1]
if __name__ == "__main__":
    sys.path[:0] = [str(TESTS.parent), *(str(TESTS / name) for name in ("", "engine", "projects"))]

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

import argparse
import copy
import datetime
import functools
import itertools
import os
import random
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import cv2
import numpy as np
import torch
from detectron2.config import LazyConfig
from equality import equal
from fault_runs import Run, processes_of
from forked import LONG, Process, fork_processes
from long_run import assert_flat, describe_flat, tiny_finetuning, tiny_pretraining, watch
from narrow_detectors import DETECTORS
from omegaconf import DictConfig
from tabulate import tabulate
from tiny_run import final_checkpoint
from torch.utils.data._utils import worker

from region_pretrain.data.catalog import get_records
from region_pretrain.engine import run as engine_run
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.errors import STOPPED, exit_on_user_error
from region_pretrain.overrides import apply_overrides
from region_pretrain.projects.byol import byol
from region_pretrain.projects.ccop import ccop
from region_pretrain.projects.mcl import mcl
from region_pretrain.projects.moco import moco
from region_pretrain.projects.point_region_contrast import point_region
from region_pretrain.projects.soco import soco
from region_pretrain.regions.generate import make_regions

PROJECTS = TESTS.parent / "projects"
RATIOS = [1, 2, 4]
#: Method -> its recipe for Shapes, its function of the detector, and overrides.
METHODS = {
    "SoCo": ("soco_r18-fpn", soco, ["views.sizes=[32,32,16]"]),
    "CCOP": ("ccop_r18-fpn", ccop, ["views.size=32", "views.min_area=4.0"]),
    "MCL": ("mcl_r18-fpn", mcl, ["views.montage.images_per_canvas=[1,2,4]"]),
    "PointRegionContrast": (
        "point-region_r18-fpn",
        point_region,
        ["views.size=32", "views.cells=8", "views.pairs=16"],
    ),
    "MoCo": ("moco-v2_r18", moco, ["views.size=32"]),
    "BYOL": ("byol_r18", byol, ["views.size=32"]),
}
ITERATIONS = 24
#: How a run may end: killed; with a line about a worker or process that was killed; or, after a
#: TERM, with a checkpoint or before there was anything to save.
EXIT_CODES = dict.fromkeys(("all", "main"), {-signal.SIGKILL})
EXIT_CODES |= {"child": {2, 128 + signal.SIGKILL}}
_TERM = {STOPPED, -signal.SIGTERM, 128 + signal.SIGTERM, 128 + signal.SIGUSR2}
EXIT_CODES |= dict.fromkeys(("TERM all", "TERM main"), _TERM)


def make_images(folder: Path) -> tuple[str, str]:
    """Twelve images and their regions; returns the names of the data set and the store."""
    images, rng = folder / "images", np.random.default_rng(0)
    images.mkdir(parents=True)
    for i in range(12):
        image = np.full((64, 64, 3), 120, np.uint8)
        for x, y, *colour in rng.integers(0, 44, (6, 5)).tolist():
            cv2.rectangle(image, (x, y), (x + 24, y + 20), [5 * c for c in colour], -1)
        cv2.imwrite(str(images / f"{i:02d}.png"), image)
    names, store = f"folder://{images}", str(folder / "regions.arrow")
    make_regions(get_records(names), store, "shapes-v1", workers=1)
    return names, store


def make_config(method: str, names: str, store: str, norm: str = "BN") -> DictConfig:
    """A method's recipe around a narrow detector, for :func:`make_images`."""
    recipe, function, views = METHODS[method]
    cfg = LazyConfig.load(str(PROJECTS / method / f"configs/{recipe}_b32_shapes.py"))
    ratios = {"ratios": RATIOS} if method == "MCL" else {}
    detector = DETECTORS["Faster/Mask R-CNN, FPN"]()
    bottom_up = detector.backbone.bottom_up
    for module in (bottom_up.stem, *bottom_up.stages):
        module.norm = norm
    cfg.model = function(detector, hidden_dim=16, dim=16, **ratios)
    for key in (key for key in cfg.model if key.endswith("queue")):
        cfg.model[key].length = 64
    dataset = cfg.dataloader.train.dataset
    dataset.names = names
    if dataset.get("regions") is not None:
        dataset.regions, dataset.recipe = store, None
    return apply_overrides(
        cfg,
        [
            *(f"dataloader.train.dataset.{view}" for view in views),
            "dataloader.train.total_batch_size=4",
            f"train.max_iter={ITERATIONS}",
            "train.log_period=1",
            "train.checkpointer.period=3",
            "train.checkpointer.max_to_keep=2",
            "train.device=cpu",
        ],
    )


def train(cfg: DictConfig) -> None:
    do_pretrain(cfg, resume=True)


@exit_on_user_error
def main_of_run(cfg: DictConfig, processes: int) -> None:
    launch(train, processes, device="cpu", args=(cfg,))


class MethodRun(Run):
    """A run of a method; each start may have another number of loader workers."""

    def __init__(self, folder: Path, cfg: DictConfig, processes: int) -> None:
        super().__init__(folder, processes)
        self._cfg, self._processes = cfg, processes

    def start(self, workers: int = 0) -> Process:
        cfg = copy.deepcopy(self._cfg)
        cfg.train.output_dir = str(self.folder)
        cfg.dataloader.train.num_workers = workers

        def run() -> None:
            fork_processes()
            engine_run.collect_env_info = str  # takes a second
            worker.MP_STATUS_CHECK_INTERVAL = 0.3  # seconds between looks for its parent
            main_of_run(cfg, self._processes)

        return Process(run, self.out)

    def done(self) -> int:
        """Number of logged iterations."""
        return len(self.losses())

    def is_saving(self) -> bool:
        return self.folder.is_dir() and any(".pth.part" in n for n in os.listdir(self.folder))


@dataclass
class Results:
    """What has been killed so far.

    Attributes:
        kills: (method, processes, instant, target) of each.
        runs: number of finished runs per method and number of processes.
        saved: number of kills after which a checkpoint was saved on request.
    """

    kills: list[tuple[str, int, str, str]] = field(default_factory=list)
    runs: Counter = field(default_factory=Counter)
    saved: int = 0


def tracebacks(text: str) -> list[str]:
    """What follows each "Traceback" in a run's output.

    Left out are those of Python's thread that hands a loader worker's tensors to the run: it prints
    the error of a connection whose other end was killed.
    """
    blocks = text.split("Traceback (most recent call last):\n")[1:]
    return [block for block in blocks if "resource_sharer.py" not in block.split("\n")[0]]


def kill_once(run: MethodRun, rng: random.Random, startup: float) -> tuple[str, str, int] | None:
    """Start a run and kill it.

    Returns:
        The instant, what was killed and how, and the exit code; None if the run ended before.
    """
    instants: dict[str, Callable[[], bool]] = {
        "start": lambda: True,
        "step": functools.partial(lambda goal: run.done() >= goal, run.done() + rng.randint(1, 4)),
        "save": run.is_saving,
        "any": lambda: True,
    }
    instant = rng.choice(list(instants))
    delays = {"start": startup, "step": 0.1, "save": 0.0, "any": 2 * startup}
    delay = rng.uniform(0, delays[instant])
    target = rng.choice(["all", "main", "child", "child", "TERM main", "TERM all"])
    process = run.start(workers=rng.randrange(3))
    deadline = time.monotonic() + LONG
    while not instants[instant]():
        assert time.monotonic() < deadline, run.output()[-3000:]
        if process.poll() is not None:
            break
        time.sleep(0.001)
    time.sleep(delay)
    number = signal.SIGTERM if "TERM" in target else signal.SIGKILL
    if process.poll() is None:
        children = [pid for pid in processes_of(process.pid) if pid != process.pid]
        if not children:
            target = target.replace("child", "main").replace("all", "main")
        try:
            if target.endswith("all"):
                os.killpg(process.pid, number)
            else:
                os.kill(rng.choice(children) if target == "child" else process.pid, number)
        except ProcessLookupError:  # the child has just ended
            target = "nothing"
    code = process.wait(LONG)
    while processes_of(process.pid):  # they notice that their parent is gone
        assert time.monotonic() < deadline, f"left behind: {processes_of(process.pid)}"
        time.sleep(0.01)
    return None if code == 0 or target == "nothing" else (instant, target, code)


def soak(
    folder: Path,
    kills: int,
    seed: int,
    say: Callable[[str], None] = print,
) -> Results:
    """Kill and resume runs until this many kills have struck.

    Raises:
        AssertionError: a run ended in another way than it may, or differs from the unkilled one.
    """
    rng, results, began = random.Random(seed), Results(), time.monotonic()
    kills_of_a_run = min(10, 1 + kills // (2 * len(METHODS)))
    names, store = make_images(folder)
    configs = {method: make_config(method, names, store) for method in METHODS}
    whole: dict[tuple[str, int], tuple[MethodRun, float]] = {}
    for number in itertools.count():
        if len(results.kills) >= kills:
            return results
        key = method, processes = list(METHODS)[number % 6], 1 + number // 6 % 2
        if key not in whole:
            reference = MethodRun(folder / f"{method}{processes}", configs[method], processes)
            started = time.monotonic()
            process = reference.start()
            reference.wait_for(0, process)
            startup = time.monotonic() - started
            assert process.wait(LONG) == 0, reference.output()[-3000:]
            whole[key] = reference, startup
        reference, startup = whole[key]
        run = MethodRun(folder / f"{method}{processes}-{number}", configs[method], processes)
        struck = 0
        while struck < kills_of_a_run and len(results.kills) < kills:
            killed = kill_once(run, rng, startup)
            if killed is None:
                break
            instant, target, code = killed
            text = run.output()
            assert code in EXIT_CODES[target] and not tracebacks(text), (killed, text[-3000:])
            struck += 1
            results.saved += code == STOPPED
            results.kills.append((method, processes, instant, target))
            left = (time.monotonic() - began) / len(results.kills) * (kills - len(results.kills))
            say(
                f"[{len(results.kills)}/{kills}] {method} x {processes}: {target}, at: {instant}, "
                f"exit code {code}, {run.done()}/{ITERATIONS} iterations; "
                f"ETA {datetime.timedelta(seconds=round(left))}"
            )
        assert run.start().wait(LONG) == 0, run.output()[-3000:]
        assert run.losses() == reference.losses() and run.done() == ITERATIONS, key
        assert equal(final_checkpoint(run.folder), final_checkpoint(reference.folder)), key
        assert not list(run.folder.glob("*.part*"))
        results.runs[key] += 1
    raise AssertionError


def describe(results: Results) -> str:
    """Kills per method, number of processes, and target."""
    targets = list(EXIT_CODES)
    counts = Counter((m, p, target) for m, p, _, target in results.kills)
    rows = [
        [m, p, runs, *(counts[m, p, t] for t in targets), sum(counts[m, p, t] for t in targets)]
        for (m, p), runs in sorted(results.runs.items())
    ]
    instants = Counter(instant for _, _, instant, _ in results.kills)
    return (
        tabulate(rows, ["method", "processes", "runs", *targets, "kills"])
        + f"\n\ninstants: {dict(instants)}; {results.saved} saved a checkpoint on request"
        + f"\n{sum(results.runs.values())} runs, all equal to the unkilled ones bit for bit"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200, help="default %(default)s")
    parser.add_argument(
        "--steps", type=int, default=20_000, help="of each long run (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of the moments (default: drawn)")
    args = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    say = functools.partial(print, flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        say(describe(soak(Path(folder), args.kills, seed, say)))
    for make in (tiny_pretraining, tiny_finetuning):
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            say(f"\n{make.__name__}: {args.steps} steps")
            rows = watch(make(Path(folder), args.steps), Path(folder), args.steps)
            say(describe_flat(rows))
            assert_flat(rows)


if __name__ == "__main__":
    main()
