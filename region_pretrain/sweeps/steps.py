"""Command lines that run one after the other, each with its log, and never twice."""

from __future__ import annotations

import json
import logging
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from region_pretrain.engine.output_dir import holds_run
from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.jobs.snapshot import in_checkout

logger = logging.getLogger(__name__)

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
#: A training's line, a progress bar's, any other that says how long it will take.
_PROGRESS = (r"iter \d+/\d+.*", r"[\w :]*\d+%\|.*", r".*\beta\b.*")
_TAIL = 15  # lines of a failed step's log that are shown


class Steps:
    """Runs command lines and keeps account of them in ``<folder>/steps.json``.

    A step that is finished is not run again, unless its command line has changed; one that was
    stopped goes on where the tool's ``--resume`` takes it up.

    Args:
        folder: for ``steps.json`` and ``logs/``; made here.
        say: takes the lines that a person shall see.
        every: seconds between two lines of a step's progress.
    """

    def __init__(self, folder: str, say: Callable[[str], None], every: float = 5.0) -> None:
        self._path = os.path.join(folder, "steps.json")
        self._logs = os.path.join(folder, "logs")
        self._say = say
        self._every = every
        os.makedirs(self._logs, exist_ok=True)
        self._steps: dict[str, dict] = {}
        if os.path.exists(self._path):
            with open(self._path, encoding="utf-8") as file:
                self._steps = json.load(file)

    def minutes(self, name: str) -> float:
        """How long a step took, its interrupted attempts included."""
        return self._steps[name]["seconds"] / 60

    def command(self, name: str) -> str:
        """A step's command line, as it can be typed."""
        return shlex.join(["python", *self._steps[name]["command"]])

    def run(
        self,
        name: str,
        tool: str,
        arguments: Sequence[str],
        product: str,
        run_folder: str | None = None,
    ) -> None:
        """Run a tool of the checkout unless that has been done.

        Args:
            name: of the step, and of its log.
            tool: its path in the checkout.
            arguments: flags, then overrides.
            product: a file that is there when the step is finished.
            run_folder: the output folder of a training, which is resumed if it holds a run.

        Raises:
            UserError: the tool failed; the message has its log's name and last lines.
        """
        command = [in_checkout(tool), *arguments]
        record = self._steps.get(name)
        same = record is not None and record["command"] == command
        if same and record["finished"] and os.path.exists(product):
            self._say(f"\n[{name}] finished before, in {self.minutes(name):.1f} min")
            return
        unfinished = same and not record["finished"]
        self._steps[name] = {
            "command": command,
            "seconds": record["seconds"] if unfinished else 0.0,
            "finished": False,
        }
        if run_folder is not None and holds_run(run_folder):
            command = [command[0], "--resume", *command[1:]]
        self._say(f"\n[{name}]\n$ {shlex.join(['python', *command])}")
        started = time.perf_counter()
        try:
            self._execute(name, command)
            if not os.path.exists(product):
                raise UserError(f"the step {name} ended without {product}; see {self.log(name)}")
            self._steps[name]["finished"] = True
        finally:
            self._steps[name]["seconds"] += time.perf_counter() - started
            write_text_atomic(self._path, json.dumps(self._steps, indent=2) + "\n")
        self._say(f"[{name}] {self.minutes(name):.1f} min")

    def log(self, name: str) -> str:
        """Path of a step's log."""
        return os.path.join(self._logs, f"{name.replace(' ', '_')}.txt")

    def _execute(self, name: str, command: Sequence[str]) -> None:
        lines: list[str] = []
        shown = 0.0
        with (
            open(self.log(name), "a", 1, encoding="utf-8") as log,
            subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                encoding="utf-8",
                errors="replace",  # universal newlines: a progress bar's \r ends a line, too
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            ) as process,
        ):
            try:
                for line in process.stdout:
                    line = _ANSI.sub("", line.rstrip())
                    log.write(f"{line}\n")
                    lines = [*lines[1 - _TAIL :], line] if line else lines
                    if time.monotonic() - shown >= self._every and (text := _progress(line)):
                        shown = time.monotonic()
                        self._say(f"  {text}")
            except BaseException:
                process.terminate()
                raise
        if process.returncode:
            raise UserError(self._failure(name, process.returncode, lines))

    def _failure(self, name: str, code: int, lines: list[str]) -> str:
        last = lines[-1] if lines else ""
        if not last.startswith("error: "):  # a tool's own word on bad input says it all
            last = "\n  ".join(["the log ends:", *lines])
        return f"the step {name} failed (exit code {code}, log {self.log(name)}): {last}"


def _progress(line: str) -> str | None:
    found = next((m for p in _PROGRESS if (m := re.search(p, line, re.IGNORECASE))), None)
    return found[0].strip() if found else None
