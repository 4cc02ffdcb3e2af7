"""A tool of the checkout as a job that submitit runs, stops, requeues and resumes.

Nothing here imports PyTorch: it runs in a process beside every training process.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import submitit
from submitit.core.utils import JobPaths
from submitit.helpers import Checkpointable

from region_pretrain.errors import STOPPED, UserError
from region_pretrain.jobs.attempts import MAX_STALLED, end_attempt, start_attempt
from region_pretrain.jobs.child import following_parent, start_child
from region_pretrain.jobs.rendezvous import rank_environment
from region_pretrain.jobs.slurm import job_state, restart_count
from region_pretrain.json_files import write_json
from region_pretrain.system import USR2, process_start

#: submitit limits the number of time-outs; :mod:`region_pretrain.jobs.attempts` counts instead.
MAX_TIMEOUTS = 10**9

_LOG_LINES = 15  # of a failed job's log, quoted in its error
#: Seconds that a failed task waits for SLURM to terminate it because another task failed first.
_PEER_FAILURE_SECONDS = 5.0
#: Exit codes of a task that has lost another one: a traceback, or NCCL's watchdog has aborted it.
_PERHAPS_A_PEER = (1, -signal.SIGABRT, 128 + signal.SIGABRT)


@dataclass
class ToolJob(Checkpointable):
    """One run of a tool, as a callable that submitit pickles and runs in every task.

    The tool runs in a fresh interpreter as a child of this process, so that signals are handled at
    any time and a crash of the tool can be reported. The state of a run is in ``output_dir`` alone.
    This object never changes, so an attempt that starts from the first submission's pickle, as
    after a node crash, resumes too.

    Attributes:
        tool: path below ``root``, e.g. ``tools/pretrain_net.py``.
        arguments: flags, then overrides.
        output_dir: the run's folder, where the attempts are recorded.
        root: folder of the code that runs: a snapshot, or the checkout.
        resume: the flag that makes the tool resume, or start where there is nothing to resume. ""
            for a tool without one, which resumes automatically and may be killed at any time.
        cwd: working directory, to which relative paths in ``arguments`` refer.
        container: see :class:`region_pretrain.jobs.cluster.Cluster`.
        environment: additional environment variables of the tool; None removes one.
        parts: folder that a tool without checkpoints writes ``part-*`` files to: see
            :class:`region_pretrain.jobs.attempts.Attempt`.
        patience: seconds that the tool may take to stop after a signal.
    """

    tool: str
    arguments: Sequence[str]
    output_dir: str
    root: str
    resume: str = "--resume"
    cwd: str = field(default_factory=os.getcwd)
    container: str = ""
    environment: Mapping[str, str | None] = field(default_factory=dict)
    patience: float = 90.0
    parts: str = ""

    def __post_init__(self) -> None:
        self.output_dir = os.path.abspath(self.output_dir)
        self.root = os.path.abspath(self.root)

    def command(self) -> list[str]:
        """The tool's command line."""
        python = [*shlex.split(self.container), "python"] if self.container else [sys.executable]
        resume = [self.resume] if self.resume else []
        return [*python, "-u", os.path.join(self.root, self.tool), *resume, *self.arguments]

    def __call__(self) -> str:
        """Run the tool as this task's rank.

        Returns:
            ``output_dir``, once the tool has finished.

        Raises:
            UserError: the tool failed, or too many attempts wrote no checkpoint.
            SystemExit: the tool was stopped or killed, and resumes in another attempt.
        """
        return _Task(self, submitit.JobEnvironment()).run()


class _Task:
    """One attempt of one rank."""

    def __init__(self, job: ToolJob, env: submitit.JobEnvironment) -> None:
        self.job, self.env = job, env
        self.signalled: signal.Signals | None = None
        # submitit's debug executor does not set its folder.
        folder = os.environ.get("SUBMITIT_FOLDER", os.path.join(job.output_dir, "slurm"))
        self.log = JobPaths(folder, env.job_id, env.global_rank).stdout
        note = f"{env.job_id}_{restart_count()}_{env.global_rank}.json"
        self._note = os.path.join(folder, "tasks", note)

    def run(self) -> str:
        if self.env.cluster == "local":  # SLURM ends all processes of a job itself
            following_parent(signal.SIGKILL, os.getppid())()
            if process_start(int(self.env.job_id)) is None:
                sys.exit("the job's controller was killed")
        if self.env.global_rank == 0:
            self._start_attempt()
        self._write_note("running")
        numbers = [number for number in (USR2, signal.SIGTERM) if number is not None]
        previous = {number: signal.signal(number, self._on_signal) for number in numbers}
        try:
            return self._conclude(self._run_tool())
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _start_attempt(self) -> None:
        folder = self.job.output_dir
        facts = self.env.job_id, restart_count(), socket.gethostname(), self.job.parts
        stalled = start_attempt(folder, *facts)
        if stalled >= MAX_STALLED:
            error = (
                f"{self.job.tool} for {folder}: {stalled} consecutive attempts ended without a new "
                f"{'part' if self.job.parts else 'checkpoint'}; see {self.log}, then submit it "
                "again"
            )
            self._end("failed", error=error)
            raise UserError(error)

    def _on_signal(self, number: int, frame: object) -> None:
        self.signalled = signal.Signals(number)

    def _run_tool(self) -> int | None:
        """Run the tool; returns its exit code, or None if it was killed for not stopping."""
        environment = {**rank_environment(self.env), **self.job.environment}
        child = start_child(self.job.command(), self.job.root, self.job.cwd, environment)
        deadline = None
        try:
            while True:
                try:
                    return child.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    pass
                if self.signalled is None:
                    continue
                if deadline is None:
                    self._write_note("signalled")
                    deadline = time.monotonic() + self.job.patience
                # Whoever sent TERM also kills what does not stop in time.
                late = time.monotonic() > deadline and self.signalled == USR2
                if late or not self.job.resume:
                    return None
                # SLURM signals every process, other launchers only this one. A repeated signal is
                # harmless, and reaches a tool that was still importing when the first one came.
                child.send_signal(USR2 or signal.SIGTERM)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _conclude(self, code: int | None) -> str:
        """Record how the attempt ended, requeue the job if necessary, and return or exit."""
        if code == 0:
            self._end("finished")
            return self.job.output_dir
        if code in _PERHAPS_A_PEER and self.env.num_tasks > 1:
            self._wait_for_peer_failure()
        asked_to_stop = self.signalled not in (None, signal.SIGTERM)
        # While it stops, a tool may find that the disk is full: another attempt would, too.
        failed = asked_to_stop and code == UserError.exit_code
        if code in (STOPPED, None) or asked_to_stop and not failed:
            if self.env.global_rank:
                sys.exit(0)  # any other code would make srun kill rank 0
            self._end("stopped")
            if self._needs_requeue():
                self.env._requeue(MAX_TIMEOUTS)  # with the local executor this exits
            sys.exit(STOPPED)
        if self.signalled == signal.SIGTERM:
            sys.exit(STOPPED)  # SLURM terminated this rank because another one failed
        if code < 0 or code > 128:  # container runtimes report a signal as 128 + number
            number = -code if code < 0 else code - 128
            self._end("killed", number)
            if self.env.cluster == "local":
                self.env._requeue(MAX_TIMEOUTS)
            sys.exit(128 + number)  # the batch script runs region_pretrain.jobs.requeue
        error = self._failure(code)
        self._end("failed", code, error)
        raise UserError(error)

    def _wait_for_peer_failure(self) -> None:
        """Wait for TERM: losing a rank that failed first makes this one fail as well."""
        deadline = time.monotonic() + _PEER_FAILURE_SECONDS
        while self.signalled is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.signalled is not None:
            self._write_note("signalled")

    def _end(self, outcome: str, code: int = 0, error: str = "") -> None:
        self._write_note(outcome, code)
        if self.env.global_rank == 0 or outcome in ("killed", "failed"):
            end_attempt(self.job.output_dir, outcome, error)

    def _write_note(self, state: str, code: int = 0) -> None:
        """Write the task's state where :mod:`region_pretrain.jobs.requeue` reads it."""
        note = {"state": state, "code": code, "output_dir": self.job.output_dir}
        os.makedirs(os.path.dirname(self._note), exist_ok=True)
        write_json(self._note, note)

    def _needs_requeue(self) -> bool:
        """False if the job was cancelled, or requeued by whoever signalled it."""
        if self.env.cluster == "slurm":
            try:
                return job_state(self.env.job_id) == "RUNNING"
            except UserError as error:
                print(f"warning: {error}", flush=True)
        return self.signalled != signal.SIGTERM

    def _failure(self, code: int) -> str:
        lines = [
            f"{self.job.tool} for {self.job.output_dir} failed on rank {self.env.global_rank} "
            f"of {self.env.num_tasks} (exit code {code}); last lines of {self.log}:"
        ]
        if self.log.exists():
            text = self.log.read_text(encoding="utf-8", errors="replace")
            lines += [line.rstrip() for line in text.splitlines()[-_LOG_LINES:]]
        return "\n  ".join(lines)
