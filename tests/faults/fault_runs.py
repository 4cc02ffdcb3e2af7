"""A tiny run in processes that a test can interrupt.

They are forked from the test, which has imported everything already, or started by a command line:
fault_runs.py FOLDER PROCESSES [KEY=VALUE ...]
"""

# ruff: noqa: E402
from __future__ import annotations

from region_pretrain.warnings import ignore_library_warnings

if __name__ in ("__main__", "__mp_main__"):  # as in a tool
    ignore_library_warnings()

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from detectron2.utils import comm
from forked import LONG, Process, fork_processes
from omegaconf import OmegaConf
from tiny_run import CLOCK, Loader, make_config, make_detection_config

from region_pretrain.data.contents import Contents
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.errors import exit_on_user_error


class SlowLoader(Loader):
    """Needs a while until it is there."""

    def __init__(self, seconds: float = 0.0, **settings):
        time.sleep(seconds)
        super().__init__(**settings)


class FolderLoader(Loader):
    """Has as many images as a folder has files."""

    def __init__(self, folder: str, **settings):
        self._files = sorted(str(path) for path in Path(folder).iterdir())
        super().__init__(num_images=len(self._files), **settings)

    def contents(self) -> Contents:
        return Contents(len(self._files), lambda i: (self._files[i], None))


class Slow(HookBase):
    """Gives a test time to interrupt a run between two steps."""

    def after_step(self) -> None:
        time.sleep(float(os.environ.get("SECONDS_PER_STEP", "0.1")))
        gate = os.environ.get("WAIT_FOR", "")
        while gate and self.trainer.iter == 9 and not os.path.exists(gate):
            time.sleep(0.05)

    def after_train(self) -> None:
        file = os.environ.get("WRITERS_CLOSED", "")
        if file and comm.is_main_process():
            time.sleep(3)  # as a tracking service does
            Path(file).touch()


def train(folder: str, changes: list[str]) -> None:
    make = make_detection_config if "kind=finetune" in changes else make_config
    cfg = make(folder, hooks=[L(Slow)()], eval_period=0)
    if make is make_config:
        cfg.dataloader.train._target_ = SlowLoader
    resume = "resume=True" in changes
    changes = [change for change in changes if not change.startswith(("resume=", "kind="))]
    cfg.merge_with(OmegaConf.from_dotlist(changes))
    (do_train if make is make_detection_config else do_pretrain)(cfg, resume)


@exit_on_user_error
def main(arguments: list[str]) -> None:
    folder, processes, *changes = arguments
    launch(train, int(processes), device="cpu", args=(folder, changes))


def processes_of(session: int) -> list[int]:
    """The living processes of a session."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] not in "ZX":
            found.append(int(pid))
    return found


class Run:
    """A tiny run.

    Args:
        folder: its output folder; what it prints is in ``<folder>.out``.
    """

    def __init__(self, folder: Path, processes: int = 1, *changes: str) -> None:
        self.folder, self.out = folder, folder.with_suffix(".out")
        self._arguments = [str(folder), str(processes), *changes]

    def start(self, *changes: str) -> Process:
        def run() -> None:
            fork_processes()
            main([*self._arguments, *changes])

        return Process(run, self.out)

    def start_command(self, *changes: str) -> subprocess.Popen:
        command = [sys.executable, __file__, *self._arguments, *changes]
        with open(self.out, "ab") as out:
            return subprocess.Popen(command, stdout=out, stderr=out, start_new_session=True)

    def finish(self, *changes: str) -> int:
        return self.start(*changes).wait(LONG)

    def output(self) -> str:
        return self.out.read_text(errors="replace")

    def losses(self) -> list[dict]:
        """metrics.json without timings, and without a line that is still being written."""
        path, found = self.folder / "metrics.json", []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                found.append({k: v for k, v in json.loads(line).items() if k not in CLOCK})
            except ValueError:
                break
        return found

    def wait_for(self, iteration: int, process: Process | subprocess.Popen) -> None:
        self.until(lambda: any(r["iteration"] >= iteration for r in self.losses()), process)

    def until(self, condition, process: Process | subprocess.Popen) -> None:
        deadline = time.monotonic() + LONG
        while True:
            code = process.poll()  # first: the last thing a process does may be what is awaited
            if condition():
                return
            assert code is None and time.monotonic() < deadline, self.output()
            time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1:])
