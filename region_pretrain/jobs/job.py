"""A tool of the checkout as a job that submitit runs, stops, requeues and goes on with.

Nothing here imports PyTorch: these lines run beside every training process.
"""

from __future__ import annotations

import dataclasses
import json
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
from submitit.core.utils import (
    DelayedSubmission,
    FailedJobError,
    JobPaths,
    environment_variables,
)
from submitit.slurm.slurm import SlurmExecutor

from region_pretrain.errors import STOPPED, UserError
from region_pretrain.jobs.attempts import MAX_FRUITLESS, end_attempt, start_attempt
from region_pretrain.jobs.child import start_child
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.jobs.rendezvous import job_state, rank_environment, restart_count

_TAIL = 15  # lines of a failed job's log that its error shows
#: So long a task that failed waits for the news that another one failed before it.
_BLAME_SECONDS = 5.0
#: submitit counts time-outs; an attempt that got somewhere needs no counting (see ``attempts``).
_TIMEOUTS = 10**9


@dataclass
class ToolJob:
    """One tool's run, as a callable that submitit pickles and runs once a task.

    The tool runs in a fresh interpreter beside this one: a signal finds a process that listens at
    any time, and a crash of the tool leaves one that can tell of it. Everything that an attempt
    leaves is in ``output_dir``; this object never changes, so an attempt that starts from the
    pickle of the first submission, as after a crash of a node, goes on as well.

    Attributes:
        tool: path below ``root``, e.g. ``tools/pretrain_net.py``.
        arguments: flags, then overrides.
        output_dir: the run's folder; attempts are noted there.
        root: the code that runs: a snapshot, or the checkout.
        resume: the flag with which the tool goes on, or starts where there is nothing yet. "" for
            a tool that has none: it goes on by itself, and may be killed at any time.
        cwd: relative paths among the arguments start here.
        container: see :class:`region_pretrain.jobs.cluster.Cluster`.
        environment: further variables of the tool; None removes one.
        patience: seconds that the tool may take to stop when told.
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

    def __post_init__(self) -> None:
        self.output_dir = os.path.abspath(self.output_dir)
        self.root = os.path.abspath(self.root)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit submits again: the same job, as nothing of its state is in here."""
        return DelayedSubmission(self)

    def command(self) -> list[str]:
        """The tool's command line."""
        python = [*shlex.split(self.container), "python"] if self.container else [sys.executable]
        resume = [self.resume] if self.resume else []
        return [*python, "-u", os.path.join(self.root, self.tool), *resume, *self.arguments]

    def __call__(self) -> str:
        """Run the tool as this task's rank.

        Returns:
            ``output_dir``, of a tool that came to its end.

        Raises:
            UserError: the tool failed, or its attempts get nowhere.
            SystemExit: it was stopped or killed; it will go on in another attempt.
        """
        task = _Task(self, submitit.JobEnvironment())
        return task.run()


class _Task:
    """One rank's attempt."""

    def __init__(self, job: ToolJob, env: submitit.JobEnvironment) -> None:
        self.job, self.env = job, env
        self.told: signal.Signals | None = None
        # submitit's debug executor does not say where its folder is.
        folder = os.environ.get("SUBMITIT_FOLDER", os.path.join(job.output_dir, "slurm"))
        self.log = JobPaths(folder, env.job_id, env.global_rank).stdout
        note = f"{env.job_id}_{restart_count()}_{env.global_rank}.json"
        self._note = os.path.join(folder, "tasks", note)

    def run(self) -> str:
        if self.env.global_rank == 0:
            host = socket.gethostname()
            job = self.job
            fruitless = start_attempt(job.output_dir, self.env.job_id, restart_count(), host)
            if fruitless >= MAX_FRUITLESS:
                error = (
                    f"{job.tool} for {job.output_dir}: {fruitless} attempts in a row ended without "
                    f"a new checkpoint; see {self.log}, and submit it again"
                )
                self._end("failed", error=error)
                raise UserError(error)
        self._write_note("running")
        usual = {s: signal.signal(s, self._on_signal) for s in (signal.SIGUSR2, signal.SIGTERM)}
        try:
            return self._conclude(self._wait())
        finally:
            for number, handler in usual.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        self.told = signal.Signals(number)

    def _wait(self) -> int | None:
        """The tool's exit code; None if it would not stop."""
        environment = {**rank_environment(self.env), **self.job.environment}
        child = start_child(self.job.command(), self.job.root, self.job.cwd, environment)
        deadline = None
        try:
            while True:
                try:
                    return child.wait(timeout=0.5)
                except subprocess.TimeoutExpired:
                    pass
                if self.told is None:
                    continue
                if deadline is None:
                    self._write_note("told")
                    deadline = time.monotonic() + self.job.patience
                # After TERM, who sent it puts an end to what does not stop.
                late = time.monotonic() > deadline and self.told == signal.SIGUSR2
                if late or not self.job.resume:
                    return None
                # SLURM tells every process, other launchers only this one. Telling twice is
                # harmless, and a process that is still starting hears it later.
                child.send_signal(signal.SIGUSR2)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()

    def _conclude(self, code: int | None) -> str:
        if code == 0:
            self._end("finished")
            return self.job.output_dir
        if code == 1 and self.env.num_tasks > 1:
            self._wait_for_blame()
        if code == STOPPED or code is None or self.told is not None:
            # A TERM and another exit code: the step ends as another rank has failed, which says so.
            agreed = code in (STOPPED, None) or self.told == signal.SIGUSR2
            if agreed and self.env.global_rank == 0:
                self._end("stopped")
                if self._shall_requeue():
                    self.env._requeue(_TIMEOUTS)  # the local executor's leaves here
            sys.exit(0 if agreed and self.env.global_rank else STOPPED)  # 0 ends no other rank
        if code < 0 or code > 128:  # a container's run-time reports a signal as a shell does
            number = -code if code < 0 else code - 128
            self._end("killed", number)
            if self.env.cluster == "local":
                self.env._requeue(_TIMEOUTS)
            sys.exit(128 + number)  # the batch script requeues: see region_pretrain.jobs.after
        error = self._failure(code)
        self._end("failed", code, error)
        raise UserError(error)

    def _wait_for_blame(self) -> None:
        """Where another task ended first, its loss is why this one failed, and TERM comes soon."""
        deadline = time.monotonic() + _BLAME_SECONDS
        while self.told is None and time.monotonic() < deadline:
            time.sleep(0.1)
        if self.told is not None:
            self._write_note("told")

    def _end(self, outcome: str, code: int = 0, error: str = "") -> None:
        self._write_note(outcome, code)
        if self.env.global_rank == 0 or outcome in ("killed", "failed"):
            end_attempt(self.job.output_dir, outcome, error)

    def _write_note(self, state: str, code: int = 0) -> None:
        note = {"state": state, "code": code, "output_dir": self.job.output_dir}
        os.makedirs(os.path.dirname(self._note), exist_ok=True)
        with open(self._note, "w", encoding="utf-8") as file:
            json.dump(note, file)

    def _shall_requeue(self) -> bool:
        """Not where the job was cancelled, or is requeued already by who told it to stop."""
        if self.env.cluster != "slurm":
            return self.told != signal.SIGTERM
        state = job_state(self.env.job_id)
        return self.told != signal.SIGTERM if state is None else state == "RUNNING"

    def _failure(self, code: int) -> str:
        lines = []
        if self.log.exists():
            with open(self.log, encoding="utf-8", errors="replace") as file:
                lines = [line.rstrip() for line in file][-_TAIL:]
        return "\n  ".join(
            [
                f"{self.job.tool} for {self.job.output_dir} failed on rank {self.env.global_rank} "
                f"of {self.env.num_tasks} (exit code {code}, log {self.log}), which ends:",
                *lines,
            ]
        )


def make_executor(folder: str, cluster: Cluster, name: str) -> submitit.Executor:
    """The submitit executor of a cluster.

    Args:
        folder: for submission files, pickles and logs; all nodes must see it.
        cluster: the settings.
        name: of the jobs.
    """
    if cluster.kind == "debug":
        return submitit.DebugExecutor(folder)
    if cluster.kind == "local":
        executor = submitit.LocalExecutor(folder, max_num_timeout=_TIMEOUTS)
        executor.update_parameters(
            timeout_min=cluster.time or 60 * 24 * 365,
            tasks_per_node=cluster.tasks,
            gpus_per_node=cluster.gpus_per_node or 0,
            signal_delay_s=cluster.signal_seconds,
            stderr_to_stdout=True,
            setup=list(cluster.setup),
        )
        return executor
    return _slurm_executor(SlurmExecutor, folder, cluster, name, ())


def _slurm_executor(
    executor_class: type[SlurmExecutor],
    folder: str,
    cluster: Cluster,
    name: str,
    after: Sequence[str],
    root: str | None = None,
) -> SlurmExecutor:
    executor = executor_class(folder, max_num_timeout=_TIMEOUTS)
    path = f"export PYTHONPATH={shlex.quote(root)}${{PYTHONPATH:+:$PYTHONPATH}}"
    cpus = cluster.cpus_per_task
    parameters = {
        "job_name": name,
        "time": cluster.time,  # None here, as submitit's own default is five minutes
        "mem": None if cluster.mem_gb is None else f"{round(cluster.mem_gb * 1024)}M",
        "ntasks_per_node": cluster.tasks,
        "signal_delay_s": cluster.signal_seconds,
        "stderr_to_stdout": True,
        "setup": [*cluster.setup, *([path] if root else [])],
        # What is left of a step ends with its first failed task. Newer sruns do not take the
        # number of cores from sbatch.
        "srun_args": ["--kill-on-bad-exit=1", *([f"--cpus-per-task={cpus}"] if cpus else [])],
        "teardown": [
            "code=$?",
            f"[ $code -eq 0 ] || {executor.python} -m region_pretrain.jobs.after "
            f"{shlex.quote(str(executor.folder))} $code",
            "exit $code",
        ],
        "additional_parameters": {"requeue": True, **cluster.extra},
    }
    if after:
        parameters["dependency"] = "afterok:" + ":".join(after)
        parameters["additional_parameters"]["kill-on-invalid-dep"] = "yes"
    same = ("partition", "account", "qos", "constraint", "nodes", "gpus_per_node")
    same += ("cpus_per_task", "gres", "exclude", "array_parallelism")
    parameters |= {key: value for key in same if (value := getattr(cluster, key)) is not None}
    executor.update_parameters(**parameters)
    return executor


def submit(
    jobs: Sequence[ToolJob],
    cluster: Cluster,
    folder: str,
    name: str,
    after: Sequence[str] = (),
) -> list[submitit.Job]:
    """Submit jobs; the shell is not held.

    Args:
        jobs: several are one job array, of which ``cluster.array_parallelism`` run at once. All of
            them have one ``root``.
        cluster: where. With ``local`` all of the jobs start at once, with ``debug`` each when its
            result is asked for.
        folder: for submission files, pickles and logs; all nodes must see it.
        name: of the jobs, in ``squeue``.
        after: SLURM: ids of jobs that must have succeeded; should one fail, these are cancelled.

    Returns:
        One submitit job each, in order.

    Raises:
        UserError: SLURM refuses them; the message has its words.
    """
    os.makedirs(folder, exist_ok=True)
    jobs = [_prepared(job, cluster) for job in jobs]
    path = os.pathsep.join(p for p in (_root(jobs), os.environ.get("PYTHONPATH")) if p)
    with environment_variables(PYTHONPATH=path):
        if cluster.kind != "slurm":
            executor = make_executor(folder, cluster, name)
            return [executor.submit(job) for job in jobs]
        executor = _slurm_executor(SlurmExecutor, folder, cluster, name, after, _root(jobs))
        try:
            return executor.submit_array(jobs) if len(jobs) > 1 else [executor.submit(jobs[0])]
        except FailedJobError as error:
            said = " ".join(str(error).replace("sbatch: error: ", "").split())
            raise UserError(f"sbatch refuses the job {name}: {said}") from error


def sbatch_texts(
    jobs: Sequence[ToolJob],
    cluster: Cluster,
    folder: str,
    name: str,
    after: Sequence[str] = (),
) -> list[str]:
    """The sbatch files that :func:`submit` would submit; SLURM need not be here."""

    class DryRun(SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:
            return 1

    executor = _slurm_executor(DryRun, folder, cluster, name, after, _root(jobs))
    if len(jobs) > 1:
        executor.parameters["map_count"] = len(jobs)
    return [executor._make_submission_file_text(executor._submitit_command_str, "")]


def _root(jobs: Sequence[ToolJob]) -> str:
    roots = {job.root for job in jobs}
    if len(roots) != 1:
        raise ValueError(f"jobs submitted together run one code, not {sorted(roots)}")
    return roots.pop()


def _prepared(job: ToolJob, cluster: Cluster) -> ToolJob:
    environment: dict[str, str | None] = {}
    if cluster.kind == "local":
        if not cluster.gpus_per_node:  # submitit hides all GPUs then
            environment["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES")
        if "OMP_NUM_THREADS" not in os.environ:
            share = len(os.sched_getaffinity(0)) // (cluster.jobs * cluster.tasks)
            environment["OMP_NUM_THREADS"] = str(cluster.cpus_per_task or max(1, share))
    return dataclasses.replace(
        job,
        container=cluster.container,
        environment={**environment, **job.environment},
        patience=max(5.0, cluster.signal_seconds - 30.0),
    )
