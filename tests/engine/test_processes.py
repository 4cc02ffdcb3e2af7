import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from forked import LONG, Process
from tiny_run import (
    CLOCK,
    fail_on_second,
    make_config,
    refuse,
    refuse_on_main_process,
    train_in_process,
    use_all_groups_and_end,
    write_ranks,
    write_threads,
)
from torch import distributed as dist
from torch.multiprocessing import ProcessRaisedException

from region_pretrain.engine import processes
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import fail_together, launch, on_main_process
from region_pretrain.errors import STOPPED, ProcessKilled, UserError, exit_on_user_error


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def test_one_process_runs_here():
    seen = []
    launch(seen.append, 1, device="cpu", args=("here",))
    assert seen == ["here"]


@pytest.mark.spawns
def test_two_processes_train_as_one(tmp_path):
    # Losses are means over the batch, so equal shares average to the whole; SyncBN sees it all.
    model = {"noise": 0.0, "norm": "SyncBN"}
    launch(
        train_in_process,
        2,
        device="cpu",
        args=(str(tmp_path / "two"), False, {"max_iter": 8}, model),
    )
    cfg = make_config(tmp_path / "one", max_iter=8)
    cfg.model.update(model)
    do_pretrain(cfg)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for name in ("total_loss", "loss_main", "loss_l2", "lr"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (a["iteration"], name)
    files = [
        torch.load(tmp_path / f / "model_final.pth", weights_only=True) for f in ("one", "two")
    ]
    for part in ("model", "pretraining"):
        torch.testing.assert_close(files[0][part], files[1][part], rtol=1e-3, atol=1e-5)
    assert len(files[1]["rng"]) == 2


def test_two_processes_accumulate_as_one_with_the_whole_batch(tmp_path):
    model = {"noise": 0.0}
    train = {"max_iter": 6, "accumulate_steps": 2}
    launch(train_in_process, 2, device="cpu", args=(str(tmp_path / "two"), False, train, model))
    train_in_process(str(tmp_path / "one"), False, {"max_iter": 6}, model)
    one, two = metrics(tmp_path / "one"), metrics(tmp_path / "two")
    assert len(one) == len(two) == 6
    for a, b in zip(one, two, strict=True):
        assert b["total_loss"] == pytest.approx(a["total_loss"], rel=1e-5)
    a, b = (
        torch.load(tmp_path / f / "model_final.pth", weights_only=True)["model"]
        for f in ("one", "two")
    )
    for name, value in a.items():
        torch.testing.assert_close(b[name], value, rtol=1e-4, atol=1e-6)


def test_two_processes_resume_bit_for_bit(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train = {"checkpointer": {"period": 6, "max_to_keep": None}}
    launch(train_in_process, 2, device="cpu", args=(str(whole), False, train))
    shutil.copytree(whole, resumed)
    for name in ("model_final.pth", "model_0000017.pth"):
        (resumed / name).unlink()
    (resumed / "last_checkpoint").write_text("model_0000011.pth")
    launch(train_in_process, 2, device="cpu", args=(str(resumed), True, train))
    assert "Starting training from iteration 12" in (resumed / "log.txt").read_text()
    assert metrics(resumed) == metrics(whole)
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, resumed))
    for part in ("model", "pretraining"):
        assert all(torch.equal(a[part][k], b[part][k]) for k in a[part])
    # each process has its own noise, and continues with it
    for mine, theirs in zip(a["rng"], b["rng"], strict=True):
        assert torch.equal(mine["torch"], theirs["torch"])
    assert not torch.equal(a["rng"][0]["torch"], a["rng"][1]["torch"])


def test_a_user_error_ends_all_processes_with_one_line(tmp_path):
    child = Process(
        lambda: launch(refuse, 2, device="cpu", args=("fix train.x",)), tmp_path / "out"
    )
    assert child.wait(LONG) == 2
    text = (tmp_path / "out").read_text()
    assert [line for line in text.splitlines() if "error" in line.lower()] == ["error: fix train.x"]
    assert "Traceback" not in text


def lose_a_worker():
    raise ProcessKilled("a worker is gone")


def test_a_process_that_was_killed_has_its_own_exit_code(tmp_path):
    child = Process(lambda: launch(lose_a_worker, 2, device="cpu"), tmp_path / "out")
    assert child.wait(LONG) == 128 + signal.SIGKILL
    text = (tmp_path / "out").read_text()
    assert "error: a worker is gone\n" in text and "Traceback" not in text


def test_the_main_process_decides_for_all(tmp_path):
    launch(refuse_on_main_process, 2, device="cpu", args=(str(tmp_path),))
    for rank in "01":
        assert (tmp_path / rank).read_text() == "from 0, refused by 0"


def let_one_process_work_alone():
    """For longer than the time limit of collectives."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    with fail_together():
        time.sleep(0 if dist.get_rank() else 2.5)
    on_main_process(lambda: time.sleep(2.5))


def test_processes_wait_patiently_for_what_one_does_alone():
    launch(let_one_process_work_alone, 2, device="cpu")


def test_an_error_in_one_process_ends_all_and_leaves_the_environment():
    before = dict(os.environ)
    with pytest.raises(Exception, match="rank 1 broke"):
        launch(fail_on_second, 2, device="cpu")
    assert dict(os.environ) == before


@pytest.mark.parametrize("times", [1, 2])
def test_a_process_that_fails_since_another_was_stopped_is_not_an_error(times, monkeypatch, capsys):
    def lose_the_other(*args, **settings):
        for _ in range(times):
            os.kill(os.getpid(), signal.SIGTERM)
        raise ProcessRaisedException("RuntimeError: Connection closed by peer", 0, 1)

    monkeypatch.setattr(processes, "detectron2_launch", lose_the_other)
    ended = ProcessRaisedException if times == 1 else SystemExit
    with pytest.raises(ended) as raised:
        launch(refuse, 2, device="cpu")
    if times == 2:
        assert raised.value.code == 128 + signal.SIGTERM
        assert capsys.readouterr().err == (
            "error: stopped by SIGTERM before a checkpoint was saved; --resume continues the run\n"
        )


def environments():
    """Those of two processes that are started outside ``launch``."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for rank in range(2):
        yield {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }


def start_as_a_scheduler(function, *args):
    """Exit codes of two such processes."""
    code = (
        f"import sys; from tiny_run import {function}\n"
        "from region_pretrain.engine.processes import launch\n"
        "from region_pretrain.errors import exit_on_user_error\n"
        f"exit_on_user_error(launch)({function}, 1, device='cpu', args=sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, *args]
    children = [subprocess.Popen(command, env=os.environ | more) for more in environments()]
    return [child.wait(LONG) for child in children]


def test_signals_reach_only_the_processes_of_the_launch():
    start = multiprocessing.get_context("spawn").Process
    before = start(target=time.sleep, args=(60,))
    before.start()
    with processes._signals_reach_processes() as received:
        mine = start(target=time.sleep, args=(60,))
        mine.start()
        os.kill(os.getpid(), signal.SIGUSR2)
        mine.join(30)
        assert (mine.exitcode, received) == (-signal.SIGUSR2, [signal.SIGUSR2])
        assert before.is_alive()
    before.kill()
    before.join()


def test_processes_that_a_scheduler_started_join(tmp_path):
    def run(more):
        os.environ |= more
        exit_on_user_error(launch)(write_ranks, 1, device="cpu", args=(str(tmp_path),))

    out = tmp_path / "out"
    children = [Process(partial(run, more), out) for more in environments()]
    assert [child.wait(LONG) for child in children] == [0, 0], out.read_text()
    assert (tmp_path / "0").read_text() == "0/2 local 0 sum 3 gloo"
    assert (tmp_path / "1").read_text() == "1/2 local 1 sum 3 gloo"


# A gloo thread that frees its last tensor while the interpreter shuts down aborts the process.
@pytest.mark.spawns
@pytest.mark.parametrize(("how", "code"), [("finished", 0), ("stopped", STOPPED), ("refused", 2)])
def test_no_thread_of_gloo_is_left_when_a_process_exits(how, code, tmp_path):
    try:
        launch(use_all_groups_and_end, 2, device="cpu", args=(str(tmp_path), how))
        ended = 0
    except SystemExit as error:
        ended = error.code
    assert ended == code
    # The first process that ends with an error may end the other one.
    assert {path.read_text() for path in tmp_path.iterdir()} == {"True 0"}
    assert how == "refused" or len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize(("how", "code"), [("finished", 0), ("refused", 2)])
def test_nor_in_a_process_that_a_scheduler_started(how, code, tmp_path):
    assert start_as_a_scheduler("use_all_groups_and_end", str(tmp_path), how) == [code, code]
    assert [(tmp_path / rank).read_text() for rank in "01"] == ["True 0", "True 0"]


def test_a_group_of_the_callers_own_is_used_and_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    dist.init_process_group("gloo", f"file://{tmp_path}/store", world_size=1, rank=0)
    try:
        launch(write_group_size, 1, device="cpu", args=(str(tmp_path),))
        assert dist.is_initialized() and dist.get_world_size() == 1
    finally:
        dist.destroy_process_group()
    assert (tmp_path / "size").read_text() == "1"


def write_group_size(folder):
    with open(os.path.join(folder, "size"), "w") as f:
        f.write(str(dist.get_world_size()))


def test_missing_gpus_or_address_are_errors(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UserError, match="--num-gpus 2, but this machine has 1"):
        launch(refuse, 2, device="cuda")
    with pytest.raises(UserError, match="--dist-url"):
        launch(refuse, 1, num_machines=2, device="cuda")


@pytest.mark.parametrize(
    "url", ["tcp://node1", "tcp://node1:abc", "node1:29500", "tcp://:29500", "http://node1:29500"]
)
def test_another_address_is_refused_at_once(url):
    with pytest.raises(UserError, match=f"--dist-url {url}: write tcp://HOST:PORT"):
        launch(refuse, 1, num_machines=2, dist_url=url, device="cpu")


@pytest.mark.parametrize("rank", [-1, 2])
def test_the_rank_of_a_machine_is_below_their_number(rank):
    with pytest.raises(UserError, match=f"--machine-rank {rank} --num-machines 2: ranks are 0 to"):
        launch(refuse, 1, num_machines=2, machine_rank=rank, dist_url="tcp://a:29500", device="cpu")


class Captured(Exception):
    """Raised in place of what a test need not run."""


def test_gpu_runs_share_the_cores_too_and_the_users_choice_is_kept(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(processes, "cores", lambda: list(range(10)))
    seen = []
    monkeypatch.setattr(
        processes, "detectron2_launch", lambda *_, **__: seen.append(os.environ["OMP_NUM_THREADS"])
    )
    for given in (None, "7"):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        if given:
            monkeypatch.setenv("OMP_NUM_THREADS", given)
        launch(refuse, 4, device="cuda")
        launch(refuse, 3, device="cpu")
    assert seen == ["2", "3", "7", "7"]


def join(monkeypatch, gpus, rank=0, world=2):
    """Join a group on a machine with some GPUs; what the other ranks report is made up."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
    variables |= {"MASTER_ADDR": "node7", "MASTER_PORT": 29500}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda i: SimpleNamespace(uuid=f"GPU-{i}")
    )

    def init_process_group(backend, **arguments):
        assert arguments["store"] == ("node7", 29500, rank, world, rank == 0)
        raise Captured(backend, arguments["timeout"], chosen)

    monkeypatch.setattr(processes, "meet", lambda *args, speaks: (*args, speaks))
    monkeypatch.setattr(processes, "agree_on_device", lambda *args: None)
    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    with pytest.raises(Captured) as captured:
        launch(refuse, 1, device="cuda")
    return captured.value.args


def test_processes_of_a_scheduler_have_half_an_hour_as_those_of_launch(monkeypatch):
    assert join(monkeypatch, gpus=2, rank=1) == ("nccl", timedelta(minutes=30), [1])
    # The scheduler may show each process its own GPU only.
    assert join(monkeypatch, gpus=1, rank=1) == ("nccl", timedelta(minutes=30), [0])


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "node3")
    with pytest.raises(UserError, match="4 processes on node3, .* finds 2 GPUs: .*missing"):
        join(monkeypatch, gpus=2, world=4)
    left = []
    monkeypatch.setattr(processes, "leave_process_group", lambda: left.append(True))
    processes._refuse_shared_gpus(["GPU-1", "GPU-2"])
    processes._refuse_shared_gpus([None, None])
    with pytest.raises(UserError, match="ranks 0, 2 share one GPU: start one process per GPU"):
        processes._refuse_shared_gpus(["GPU-1", "GPU-2", "GPU-1"])
    assert left == [True]


def test_processes_of_a_scheduler_share_the_cores_of_their_machine(tmp_path, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    cores, out = len(os.sched_getaffinity(0)), tmp_path / "out"

    def run(more):
        os.environ |= more
        torch.set_num_threads(cores + 1)
        launch(write_threads, 1, device="cpu", args=(str(tmp_path),))

    def threads():
        children = [Process(partial(run, more), out) for more in environments()]
        assert [child.wait(LONG) for child in children] == [0, 0], out.read_text()
        return [int((tmp_path / rank).read_text()) for rank in "01"]

    assert threads() == [max(1, cores // 2)] * 2
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # the user's choice, as PyTorch read it at its start
    assert threads() == [cores + 1] * 2
