"""The ports at which the processes of a job find one another."""

import contextlib
import json
import os
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from region_pretrain.errors import UserError
from region_pretrain.jobs import rendezvous


def test_each_attempt_uses_another_port(monkeypatch):
    ports = set()
    for job_id in ("7", "8", "9"):
        for restart in range(20):
            monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
            ports.add(rendezvous.port(job_id))
            assert rendezvous.port(job_id) in ports and 10000 <= rendezvous.port(job_id) < 32000
    assert len(ports) >= 58  # of 60; two may collide among 22000 ports


class LocalTask:
    """One of two tasks of a local job."""

    cluster, job_id, raw_job_id, num_tasks, num_nodes = "local", "7", "7", 2, 1

    def __init__(self, rank):
        self.global_rank = self.local_rank = rank


def test_the_tasks_of_a_local_job_use_a_port_that_is_free(tmp_path):
    folder = str(tmp_path)
    with ThreadPoolExecutor(1) as pool, contextlib.ExitStack() as busy:
        for _ in range(3):
            second = pool.submit(rendezvous.rank_environment, LocalTask(1), folder)
            time.sleep(0.3)
            assert not second.done()
            first = rendezvous.rank_environment(LocalTask(0), folder)["MASTER_PORT"]
            assert second.result(10)["MASTER_PORT"] == first
            assert 10000 <= int(first) < 32000
            listener = busy.enter_context(socket.socket())
            listener.bind(("", int(first)))  # in use by somebody else from now on
            listener.listen()
            os.remove(tmp_path / "tasks/7_port.json")


def test_a_task_does_not_take_the_port_of_an_earlier_attempt(tmp_path, monkeypatch):
    rendezvous.rank_environment(LocalTask(0), str(tmp_path))
    path = tmp_path / "tasks/7_port.json"
    ended = json.loads(path.read_text()) | {"started": "earlier"}
    path.write_text(json.dumps(ended))
    monkeypatch.setattr(rendezvous, "_PATIENCE_SECONDS", 0.3)
    with pytest.raises(UserError, match="rank 0 of job 7 has not started within 0.3 s"):
        rendezvous.rank_environment(LocalTask(1), str(tmp_path))
