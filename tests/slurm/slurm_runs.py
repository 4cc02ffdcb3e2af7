"""Small runs that tests submit, interrupt and compare."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from detectron2.engine import HookBase
from detectron2.utils import comm
from tiny_run import CLOCK

import region_pretrain
from region_pretrain.engine.command_line import argument_parser
from region_pretrain.jobs.attempts import read_attempts
from region_pretrain.jobs.slurm import restart_count
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training

ROOT = Path(__file__).parents[2]


class SlowAttempts(HookBase):
    """Slows the first attempts so that a test can interrupt them; records process ids and code."""

    def __init__(self, count: int, seconds: float) -> None:
        self.seconds = seconds if restart_count() < count and "SLURM_JOB_ID" in os.environ else 0

    def before_train(self) -> None:
        who = {"pid": os.getpid(), "parent": os.getppid(), "code": region_pretrain.__file__}
        folder = Path(os.environ.get("WHO_FOLDER", os.devnull))
        if folder.is_dir():
            name = f"{folder}/{os.environ.get('SLURM_JOB_ID')}-{restart_count()}-{comm.get_rank()}"
            Path(f"{name}.part").write_text(json.dumps(who))
            os.rename(f"{name}.part", name)

    def after_step(self) -> None:
        time.sleep(self.seconds)


class BreakAt(HookBase):
    """Raises an error on one rank of a run."""

    def __init__(self, iteration: int, rank: int) -> None:
        self.iteration, self.rank = iteration, rank

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration and comm.get_rank() == self.rank:
            raise ValueError("the weather is bad")


def submit(tool: str, config: str, settings: str, folder: Path, *overrides: str) -> str:
    """Submit a run as ``tools/<tool> --slurm`` does; returns the job id."""
    parser = argument_parser("", "")
    add_slurm_arguments(parser)
    arguments = ["--slurm", settings, "--config-file", str(Path(__file__).with_name(config))]
    args = parser.parse_intermixed_args([*arguments, f"train.output_dir={folder}", *overrides])
    submit_training(args, f"tools/{tool}")
    (pickle,) = (folder / "slurm").glob("*_submitted.pkl")
    return pickle.name.split("_")[0]


def wait_until(condition: Callable[[], object], folder: Path, seconds: float = 300) -> None:
    """Poll a condition; on a time-out, fail with the queue and the ends of the job logs."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            logs = [f.read_text(errors="replace")[-3000:] for f in folder.glob("slurm/*_log.out")]
            queue = subprocess.run(["squeue", "--long"], capture_output=True, text=True).stdout
            raise AssertionError("\n".join([queue, *logs]))
        time.sleep(0.1)


def in_step(folder: Path, iteration: int) -> Callable[[], bool]:
    """A condition: the run has reached an iteration."""
    return lambda: any(line["iteration"] >= iteration for line in metrics(folder))


def is_over(folder: Path) -> bool:
    """Whether the last attempt has finished or failed."""
    attempts = read_attempts(str(folder))
    return bool(attempts) and attempts[-1].get("outcome") in ("finished", "failed")


def outcomes(folder: Path) -> list[str]:
    """How each attempt ended."""
    return [attempt["outcome"] for attempt in read_attempts(str(folder))]


def metrics(folder: Path) -> list[dict]:
    """The lines of metrics.json without timings and without a line still being written."""
    path = folder / "metrics.json"
    found = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
        except ValueError:
            continue
    return found
