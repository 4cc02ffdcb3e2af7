"""A training under different OpenMP settings, alone and beside a busy process."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tabulate import tabulate

from region_pretrain.errors import UserError
from region_pretrain.sweeps.state import tail

#: Settings by name. libgomp spins 300,000 times at a barrier if neither variable of waiting is set.
SETTINGS: dict[str, dict[str, str]] = {
    "OpenMP's default": {"GOMP_SPINCOUNT": "300000"},
    "OMP_PROC_BIND=false": {"GOMP_SPINCOUNT": "300000", "OMP_PROC_BIND": "false"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "OMP_NUM_THREADS=1": {"OMP_NUM_THREADS": "1"},
}
_OVERRIDES = (
    "train.log_period=1",
    "train.max_iter=1000000",
    "train.checkpointer.period=0",
    "train.device=cpu",
)
_BUSY = "while True: pass"
_START_SECONDS = 300.0
_POLL_SECONDS = 0.005


@dataclass
class Rates:
    """Iterations per second under one setting: medians over the rounds.

    Attributes:
        alone: without other work.
        beside: beside a process that computes all the time.
    """

    alone: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)

    def medians(self) -> tuple[float, float]:
        """(alone, beside)."""
        return statistics.median(self.alone), statistics.median(self.beside)


def compare_settings(
    command: Sequence[str],
    folder: str,
    settings: Mapping[str, Mapping[str, str]],
    seconds: float,
    rounds: int,
) -> dict[str, Rates]:
    """Measure a training under several settings in turn; all but one are suspended at any time.

    Args:
        command: command line of a training tool.
        folder: empty folder for the runs' output.
        settings: environment variables by the setting's name.
        seconds: duration of each measurement.
        rounds: number of measurements of each setting, alone and beside other work.

    Raises:
        UserError: a training ended; the message quotes its log.
    """
    rates = {name: Rates() for name in settings}
    with ExitStack() as stack:
        runs = {}
        for i, (name, variables) in enumerate(settings.items()):
            runs[name] = stack.enter_context(_started(command, Path(folder, str(i)), variables))
        for _ in range(rounds):
            for name, run in runs.items():
                rates[name].alone.append(run.rate(seconds))
                busy = subprocess.Popen([sys.executable, "-c", _BUSY])
                try:
                    rates[name].beside.append(run.rate(seconds))
                finally:
                    busy.kill()
                    busy.wait()
    return rates


class _Run:
    def __init__(self, command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> None:
        ours = ("OMP_", "GOMP_", "MKL_", "KMP_")
        kept = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
        self._metrics, self._log = folder / "metrics.json", folder.with_suffix(".log")
        with open(self._log, "wb") as log:
            self._process = subprocess.Popen(
                [*command, f"train.output_dir={folder}", *_OVERRIDES],
                env={**kept, **variables},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def signal(self, number: signal.Signals) -> None:
        if self._process.poll() is not None:
            raise UserError(f"the training ended: {' / '.join(tail(str(self._log), 5))}")
        os.killpg(self._process.pid, number)

    def end(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def wait_for(self, iterations: int, seconds: float) -> list[float]:
        """The times at which iterations ended, until there are this many or time is up."""
        before, began, times = self._done(), time.perf_counter(), []
        while len(times) < iterations and time.perf_counter() - began < seconds:
            new = self._done() - before - len(times)
            times += [time.perf_counter()] * new
            if not new:
                time.sleep(_POLL_SECONDS)
                self.signal(0)
        return times

    def rate(self, seconds: float) -> float:
        """Let the training run for a while, and return its iterations per second."""
        self.signal(signal.SIGCONT)
        began = time.perf_counter()
        # The first iteration was interrupted. If the second does not end in time, wait for it.
        times = self.wait_for(1 << 30, seconds)
        times += self.wait_for(max(0, 2 - len(times)), _START_SECONDS)
        self.signal(signal.SIGSTOP)
        if len(times) < 2:
            raise UserError(f"no iteration ended within {time.perf_counter() - began:.0f} s")
        return (len(times) - 1) / (times[-1] - times[0])

    def _done(self) -> int:
        return self._metrics.read_bytes().count(b"\n") if self._metrics.exists() else 0


@contextmanager
def _started(command: Sequence[str], folder: Path, variables: Mapping[str, str]) -> Iterator[_Run]:
    run = _Run(command, folder, variables)
    try:
        run.wait_for(2, _START_SECONDS)
        run.signal(signal.SIGSTOP)
        yield run
    finally:
        run.end()


def describe_settings(rates: Mapping[str, Rates]) -> str:
    """The results as a table, relative to the first setting alone."""
    reference = next(iter(rates.values())).medians()[0]
    rows = []
    for name, found in rates.items():
        alone, beside = found.medians()
        ratios = (alone / reference, beside / reference, beside / alone)
        rows.append([name, *(f"{ratio:.2f}" for ratio in ratios)])
    header = ["setting", "alone", "beside a busy process", "beside / alone"]
    return tabulate(rows, header, disable_numparse=True, colalign=["left", *["right"] * 3])
