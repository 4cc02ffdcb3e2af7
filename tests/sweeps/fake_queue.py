"""A queue of SLURM and a sweep that is started on it."""

import dataclasses

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs import slurm
from region_pretrain.jobs.cluster import Cluster
from region_pretrain.sweeps import jobs, state, submission
from region_pretrain.system import user_name


class Queue:
    """A queue of SLURM: job id -> state, by user. Submissions are recorded."""

    def __init__(self) -> None:
        self.users: dict[str, dict[str, str]] = {"": {}}
        self.submitted: list[str] = []
        self.cancelled: list[str] = []
        self.reasons: dict[str, str] = {}
        self.room = 99
        self.silent = 0

    def jobs_of(self, user: str = "") -> dict[str, str]:
        if self.silent:
            self.silent -= 1
            raise slurm.Unavailable("squeue failed: Socket timed out")
        return dict(self.users.get(user, {}))

    def submit(self, runs, sweep, folder, name, after=()) -> None:
        if self.room < len(runs):
            raise UserError(f"sbatch refuses the job {name}: QOSMaxSubmitJobPerUserLimit")
        for run in runs:
            self.room -= 1
            self.submitted.append(run.name)
            job = str(len(self.submitted))
            self.users[""][job] = "PENDING"
            state.write_record(run, state.Record(1, [job]))


@pytest.fixture
def queue(monkeypatch) -> Queue:
    made = Queue()
    monkeypatch.setattr(slurm, "jobs_of", made.jobs_of)
    monkeypatch.setattr(slurm, "waiting_reasons", lambda user="": made.reasons)
    monkeypatch.setattr(slurm, "cancel", made.cancelled.extend)
    monkeypatch.setattr(jobs, "submit_runs", made.submit)
    monkeypatch.setattr(submission, "check_cluster", lambda cluster: None)
    monkeypatch.setattr(submission, "take_snapshot", lambda folder, packages: "/code")
    monkeypatch.setattr(submission, "_POLL_SECONDS", 0.01)
    return made


@pytest.fixture
def start(sweeps, queue):
    """Starts the sweep on SLURM; returns what it says."""
    sweeps.add("pre")
    sweeps.add("det", "pre")

    def run(user="", **cluster) -> list[str]:
        said: list[str] = []
        made = Cluster(**{"kind": "slurm", **cluster})
        file = dataclasses.replace(sweeps.file(), cluster=made, user=user or user_name())
        submission.start(file, str(sweeps.folder), said.append)
        return said

    return run
