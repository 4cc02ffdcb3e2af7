"""Processes forked from a test, which has imported PyTorch already: they start at once."""

from __future__ import annotations

import faulthandler
import gc
import logging
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

from torch.multiprocessing.spawn import start_processes

from region_pretrain.warnings import ignore_library_warnings

TOOLS = Path(__file__).parents[1] / "tools"
LONG = 600  # seconds after which something hangs, also on a busy machine


def default_signals() -> None:
    """As in a process that was not forked."""
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def forget_handlers() -> None:
    """Those of runs in the test's own process write to what pytest has closed since."""
    for log in logging.root.manager.loggerDict.values():
        if isinstance(log, logging.Logger):
            log.handlers.clear()


class _Rank:
    """What one of several forked processes does."""

    def __init__(self, function: Callable) -> None:
        self._function = function

    def __call__(self, *arguments: object) -> None:
        default_signals()
        forget_handlers()
        self._function(*arguments)


def _fork(function, args=(), nprocs=1, join=True, daemon=False, start_method="spawn"):
    return start_processes(_Rank(function), args, nprocs, join, daemon, "fork")


def fork_processes(patch: Callable = setattr, fork: bool = True) -> None:
    """Let ``launch`` and ``torch.multiprocessing.spawn`` fork their processes.

    Args:
        patch: sets an attribute of a module.
        fork: False: as in PyTorch again.
    """
    for name in ("torch.multiprocessing", "torch.multiprocessing.spawn"):
        patch(sys.modules[name], "start_processes", _fork if fork else start_processes)


class Process:
    """A forked process in a session of its own, with the methods of ``subprocess.Popen``.

    Args:
        function: what it does; a SystemExit's code becomes its own.
        output: file that stdout is appended to.
        errors: the same for stderr; by default ``output``.
    """

    def __init__(self, function: Callable, output: Path, errors: Path | None = None) -> None:
        self.returncode: int | None = None
        self._errors = errors or output
        gc.collect()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        try:
            os.setsid()
            for stream, path in ((1, output), (2, self._errors)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
            faulthandler.register(signal.SIGUSR1, sys.stderr)
            ignore_library_warnings()
            default_signals()
            forget_handlers()
            os.register_at_fork(after_in_child=default_signals)
            code = 0
            function()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            code = 1
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, seconds: float) -> int:
        """Its exit code; if it takes longer, it is killed, and the error says what it did."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGUSR1)
                time.sleep(1)
                os.killpg(self.pid, signal.SIGKILL)
                _, status = os.waitpid(self.pid, 0)
                self.returncode = os.waitstatus_to_exitcode(status)
                text = self._errors.read_text()[-5000:]
                raise AssertionError(f"runs for more than {seconds} s:\n{text}")
            time.sleep(0.01)
        return self.returncode


def run_tool(
    name: str,
    *arguments: object,
    cwd: str | Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float = LONG,
) -> subprocess.CompletedProcess:
    """What ``subprocess.run([sys.executable, "tools/NAME", ...])`` returns, seconds earlier.

    The tool must not start processes by ``spawn``, which import its main module again. The
    ``environment`` is added to this process's.
    """
    command = [str(TOOLS / name), *map(str, arguments)]

    def run() -> None:
        os.chdir(cwd or os.getcwd())
        os.environ.update(environment or {})
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")

    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, stream) for stream in ("stdout", "stderr")]
        code = Process(run, *files).wait(seconds)
        return subprocess.CompletedProcess(command, code, *(file.read_text() for file in files))
