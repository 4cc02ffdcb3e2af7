"""A machine that comes late to a run, or never."""

import os
import re
import socket
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from forked import LONG, Process, fork_processes
from tiny_run import write_ranks

from region_pretrain.engine import roll_call
from region_pretrain.engine.processes import launch
from region_pretrain.errors import KILLED, UserError, exit_on_user_error


@pytest.fixture
def address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


@pytest.fixture(autouse=True)
def over(tmp_path, monkeypatch):
    """The file at which the patience of all ends; ``here-0``: rank 0 has told that it is there."""
    file, over = tmp_path / "over", roll_call._Wait.is_over

    class Store(roll_call.TCPStore):
        def add(self, key, number):
            count = super().add(key, number)
            if key.startswith("rank"):
                (tmp_path / key.replace("rank ", "here-")).touch()
            return count

    def is_over(self):
        roll_call._PATIENCE_SECONDS = 0.0 if file.exists() else LONG
        return over(self)

    monkeypatch.setattr(roll_call, "TCPStore", Store)
    monkeypatch.setattr(roll_call._Wait, "is_over", is_over)
    monkeypatch.setattr(roll_call, "_PATIENCE_SECONDS", LONG)
    monkeypatch.setattr(roll_call, "_QUIET_SECONDS", 0.6)
    monkeypatch.setattr(roll_call, "_REPEAT_SECONDS", 2 * LONG)
    monkeypatch.setattr(roll_call, "_FAREWELL_SECONDS", 0.5)
    monkeypatch.setattr(roll_call, "_POLL_SECONDS", 0.05)
    return file


def until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def says(path, text):
    """Whether a machine has printed this so far."""
    return path.exists() and text in path.read_text()


def machine(folder, address, rank, machines, processes=1, after=None):
    """A machine of a run; one that is late comes after another one has complained."""

    def run():
        fork_processes()
        if after is not None:
            roll_call._QUIET_SECONDS = LONG  # nobody is late any more
            until(lambda: says(after, "is waiting"))
        exit_on_user_error(launch)(
            write_ranks,
            processes,
            num_machines=machines,
            machine_rank=rank,
            dist_url=f"tcp://{address}",
            device="cpu",
            args=(str(folder),),
        )

    return Process(run, folder / f"out{rank}")


@pytest.mark.parametrize("late", [0, 1])
def test_the_others_wait_and_say_for_whom(tmp_path, address, late):
    first = tmp_path / f"out{1 - late}"
    started = [
        machine(tmp_path, address, rank, 2, after=first if rank == late else None)
        for rank in (0, 1)
    ]
    assert [process.wait(LONG) for process in started] == [0, 0], (tmp_path / "out0").read_text()
    assert [(tmp_path / rank).read_text()[:3] for rank in "01"] == ["0/2", "1/2"]
    text = (tmp_path / f"out{1 - late}").read_text()
    waits = f"rank {1 - late} of 2 is waiting at {address} for rank {late}"
    line = rf"{waits}: \d+ of at most {LONG} s\n"
    assert len(re.findall(line, text)) == 1, text
    assert re.search(r"all 2 processes are here after \d+ s", text)
    assert "waiting" not in (tmp_path / f"out{late}").read_text()


@pytest.mark.parametrize("missing", [0, 2])
def test_who_never_comes_is_named_in_one_line(tmp_path, address, missing, over):
    there = {0, 1, 2} - {missing}
    started = [machine(tmp_path, address, rank, 3) for rank in there]
    if missing:
        until(lambda: all((tmp_path / f"here-{rank}").exists() for rank in there))
    until(lambda: all(says(tmp_path / f"out{rank}", "is waiting") for rank in there))
    over.touch()
    assert [process.wait(LONG) for process in started] == [2, 2]
    for rank in there:
        text = (tmp_path / f"out{rank}").read_text()
        assert "Traceback" not in text, text
        (line,) = [line for line in text.splitlines() if "error" in line.lower()]
        start = f"error: rank {missing} of 3 did not connect to {address} within "
        assert re.match(rf"{re.escape(start)}\d+ s(: Connection refused)?: check that every", line)


def test_machines_of_two_processes_print_one_line_each(tmp_path, address, over):
    started = machine(tmp_path, address, 0, 4, processes=2)
    until(lambda: (tmp_path / "here-0").exists() and (tmp_path / "here-1").exists())
    until(lambda: says(tmp_path / "out0", "is waiting"))
    over.touch()
    assert started.wait(LONG) == 2
    text = (tmp_path / "out0").read_text()
    assert text.count("rank 0 of 8 is waiting") == text.count("is waiting") == 1
    assert text.count("error: ranks 2-7 of 8 did not connect") == text.count("error") == 1, text


def test_two_machines_of_the_same_rank_are_refused(tmp_path, address, over):
    started = [machine(tmp_path, address, rank, 3) for rank in (0, 1, 1)]
    until(lambda: says(tmp_path / "out1", "error: two processes"))
    until(lambda: (tmp_path / "here-0").exists())
    over.touch()
    assert [process.wait(LONG) for process in started] == [2, 2, 2]
    text = (tmp_path / "out1").read_text()
    assert text.count("error: two processes have rank 1 of 3: give each machine its own") == 1
    assert "error: rank 2 of 3 did not connect" in text


def test_a_port_in_use_is_one_line():
    with socket.socket() as s, pytest.raises(UserError, match="cannot listen on port .* in use"):
        s.bind(("", 0))
        s.listen()
        roll_call.meet("127.0.0.1", s.getsockname()[1], 0, 2)


@pytest.mark.parametrize(("in_job", "code"), [(True, KILLED), (False, 2)])
def test_a_job_whose_port_is_in_use_may_be_requeued(tmp_path, in_job, code):
    """Its next attempt has another port."""

    def run():
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
        os.environ |= {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        os.environ |= {"SUBMITIT_EXECUTOR": "slurm"} if in_job else {}
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    with socket.socket() as s:
        s.bind(("", 0))
        s.listen()
        assert Process(run, tmp_path / "out").wait(LONG) == code
    (line,) = (tmp_path / "out").read_text().splitlines()
    assert line.startswith("error: rank 0 cannot listen on port ")
    assert line.endswith("the job is to be started again" if in_job else "choose another")


def test_processes_of_a_scheduler_wait_too(tmp_path, address, over):
    host, port = address.split(":")

    def run():
        os.environ |= {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": host, "MASTER_PORT": port}
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    started = Process(run, tmp_path / "out")
    until(lambda: says(tmp_path / "out", "is waiting"))
    over.touch()
    assert started.wait(LONG) == 2
    text = (tmp_path / "out").read_text()
    assert "rank 1 of 2 is waiting" in text and "error: rank 0 of 2 did not connect" in text
    assert "Traceback" not in text


def test_machines_with_different_numbers_of_processes_are_refused(tmp_path, address):
    host, port = address.split(":")

    def run(rank, local_rank, local_size):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_RANK": str(local_rank)}
        os.environ |= {
            "LOCAL_WORLD_SIZE": str(local_size),
            "MASTER_ADDR": host,
            "MASTER_PORT": port,
        }
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    started = [
        Process(partial(run, *ranks), tmp_path / f"out{i}")
        for i, ranks in enumerate([(0, 0, 1), (1, 0, 2), (2, 1, 2)])
    ]
    assert [process.wait(LONG) for process in started] == [2, 2, 2]
    for i in range(3):
        text = (tmp_path / f"out{i}").read_text()
        assert text.count("error: machines with 1 and 2 processes: all must have as many") == 1
        assert "Traceback" not in text


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_machine_without_gpus_is_named_at_once(tmp_path, address, damaged, monkeypatch):
    host, port = address.split(":")

    def run(rank):
        os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
        os.environ |= {"LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": host, "MASTER_PORT": port}
        monkeypatch.setattr(socket, "gethostname", lambda: f"node{rank}")
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=i))
        device = "cpu" if rank == damaged else "cuda"
        exit_on_user_error(launch)(write_ranks, 1, device=device, args=(str(tmp_path),))

    started = [Process(partial(run, rank), tmp_path / f"out{rank}") for rank in (0, 1)]
    texts = []
    for rank, process in enumerate(started):
        assert process.wait(LONG) == 2, (tmp_path / f"out{rank}").read_text()
        texts.append((tmp_path / f"out{rank}").read_text())
    for text in texts:
        assert text.count(f"error: processes on node{damaged} would train on the CPU, and") == 1
        assert "Traceback" not in text and f"node{1 - damaged}" not in text


def test_names_of_ranks():
    assert roll_call._names([3]) == "rank 3"
    assert roll_call._names([0, 2, 3, 4, 7, 8]) == "ranks 0, 2-4, 7-8"
