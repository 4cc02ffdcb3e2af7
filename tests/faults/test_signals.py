"""Signals to one process of a run, to all of them, and too early."""

import functools
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from fault_runs import Run, Slow, processes_of
from forked import LONG
from soak import MethodRun, make_config, make_images
from tiny_run import Loader
from tiny_run import make_config as make_tiny_config
from torch.distributed import TCPStore

from region_pretrain import lease
from region_pretrain.engine import processes
from region_pretrain.engine import run as engine_run
from region_pretrain.engine.output_dir import start_logging
from region_pretrain.engine.preemption import StopRequest
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import KILLED, STOPPED, ProcessKilled, Stopped


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("model_*.pth"))


def children_of(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def same(a, b):
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (a, b))
    return all(torch.equal(a[k][n], b[k][n]) for k in ("model", "pretraining") for n in a[k])


def assert_one_line(text, line):
    assert "Traceback" not in text and "Terminating process" not in text, text
    assert text.count(line) == 1, text


@pytest.fixture(scope="module", params=[1, 2])
def undisturbed(request, tmp_path_factory):
    run = Run(tmp_path_factory.mktemp("whole") / str(request.param), request.param)
    assert run.finish() == 0, run.output()
    return request.param, run


@pytest.fixture
def gate(tmp_path, monkeypatch):
    """Runs wait for this file after their tenth iteration: they do not end before the signal."""
    file = tmp_path / "gate"
    monkeypatch.setenv("WAIT_FOR", str(file))
    return file


@pytest.mark.parametrize(
    ("number", "to_all"),
    [
        (signal.SIGUSR2, False),
        (signal.SIGTERM, False),
        (signal.SIGTERM, True),  # timeout, systemd
        (signal.SIGINT, True),  # a terminal
    ],
)
def test_a_signal_saves_and_the_run_continues_exactly(undisturbed, tmp_path, gate, number, to_all):
    processes, whole = undisturbed
    run = Run(tmp_path / "run", processes)
    process = run.start()
    run.wait_for(3, process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    time.sleep(0.3)  # a launcher passes it on
    gate.touch()
    assert process.wait(LONG) == STOPPED, run.output()
    assert_one_line(run.output(), "stopped on request: saved after iteration")
    (saved,) = checkpoints(run.folder)
    done = run.losses()[-1]["iteration"]
    # The metrics of the saved step are in the checkpoint, and written when the run continues.
    assert saved == f"model_{done + 1:07d}.pth" and 3 <= done < 18
    if number == signal.SIGUSR2 or to_all and number == signal.SIGINT:
        assert run.finish("resume=True") == 0, run.output()
        assert run.losses() == whole.losses() and same(run.folder, whole.folder)


@pytest.fixture(scope="module")
def with_workers(tmp_path_factory):
    """Creates a run whose loader has two workers."""
    folder = tmp_path_factory.mktemp("workers")
    cfg = make_config("BYOL", *make_images(folder))
    cfg.train.hooks = [L(Slow)()]
    whole = MethodRun(folder / "whole", cfg, 1)
    assert whole.start(workers=2).wait(LONG) == 0, whole.output()
    return lambda name: MethodRun(folder / name, cfg, 1), whole


def test_a_term_to_all_does_not_end_the_workers_of_a_loader(with_workers, gate):
    make, whole = with_workers
    run = make("terminated")
    process = run.start(workers=2)
    run.wait_for(3, process)
    os.killpg(process.pid, signal.SIGTERM)
    gate.touch()
    assert process.wait(LONG) == STOPPED, run.output()
    assert_one_line(run.output(), "stopped on request: saved after iteration")
    assert run.start(workers=1).wait(LONG) == 0, run.output()
    assert run.losses() == whole.losses() and same(run.folder, whole.folder)


def test_a_killed_worker_of_a_loader_ends_the_run_with_one_line(with_workers, gate):
    make, whole = with_workers
    run = make("killed")
    process = run.start(workers=2)
    run.wait_for(7, process)
    children = [pid for pid in processes_of(process.pid) if pid != process.pid]
    assert len(children) == 2
    os.kill(children[0], signal.SIGKILL)
    gate.touch()
    assert process.wait(LONG) == KILLED, run.output()
    assert_one_line(run.output(), "error: DataLoader worker ")  # or while it sent a batch
    assert "cannot be written" not in run.output()
    assert "last good checkpoint: " in run.output().splitlines()[-1]
    assert run.start().wait(LONG) == 0, run.output()
    assert run.losses() == whole.losses() and same(run.folder, whole.folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_of_one_of_two_processes_ends_both(tmp_path, gate, rank):
    run = Run(tmp_path / "run", 2, "kind=finetune", "dataloader.train.num_workers=1")
    process = run.start()
    run.wait_for(7, process)
    ranks = sorted(children_of(process.pid))[-2:]
    (worker,) = children_of(ranks[rank])
    os.kill(worker, signal.SIGKILL)
    gate.touch()
    assert process.wait(LONG) == KILLED, run.output()
    assert_one_line(run.output(), "error: DataLoader worker ")
    assert run.finish("resume=True") == 0, run.output()


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset"), EOFError()])
def test_a_worker_that_is_killed_while_it_sends_a_batch(tmp_path, monkeypatch, error):
    def iterate(self, start, stop, original=Loader.iterate):
        yield from original(self, start, 8)
        raise error

    monkeypatch.setattr(Loader, "iterate", iterate)
    text = r"worker sent no batch \(.*Error: .*\), perhaps .*0000005.pth"
    with pytest.raises(ProcessKilled, match=text):
        do_pretrain(make_tiny_config(tmp_path))


def test_a_worker_that_is_killed_while_the_run_logs(tmp_path):
    start_logging(str(tmp_path))
    log = logging.getLogger("region_pretrain")
    handlers = [h for h in log.handlers if isinstance(h, logging.StreamHandler)]
    text = "DataLoader worker (pid 7) is killed by signal: Killed."
    for handler in handlers:
        with pytest.raises(RuntimeError, match="pid 7"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(handler, "format", lambda record: raise_(RuntimeError(text)))
            handler.emit(logging.makeLogRecord({}))
    assert len(handlers) >= 2
    log.warning("still written")
    assert "still written" in (tmp_path / "log.txt").read_text()


def raise_(error):
    raise error


def test_a_term_while_an_object_is_deleted_is_not_lost(capsys):
    class Slow:
        def __del__(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    with pytest.raises(Stopped), StopRequest().listen(finished=lambda: True):
        Slow()
        time.sleep(10)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("processes", [1, 2])
def test_a_second_ctrl_c_ends_at_once(tmp_path, processes):
    run = Run(tmp_path / "run", processes, "train.checkpointer.period=0")
    process = run.start()
    run.wait_for(1, process)
    os.killpg(process.pid, signal.SIGSTOP)  # both wait until it continues
    os.killpg(process.pid, signal.SIGINT)
    os.killpg(process.pid, signal.SIGCONT)
    run.until(lambda: "stopping after this step" in run.output(), process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LONG) in (130, 137, STOPPED), run.output()
    assert "Traceback" not in run.output(), run.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_killed_while_it_writes_why_it_failed(monkeypatch, capsys, number):
    """PyTorch finds an empty file then."""

    def killed(*args, **settings):
        for _ in range(2):
            os.kill(os.getpid(), number)
            time.sleep(0.01)
        raise EOFError("Ran out of input")

    monkeypatch.setattr(processes, "detectron2_launch", killed)
    with pytest.raises(SystemExit) as ended:
        processes.launch(print, 2, device="cpu")
    assert ended.value.code == 128 + number
    assert capsys.readouterr().err.startswith(f"error: stopped by {number.name} before a checkp")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_one_process_that_has_not_trained_yet_ends_without_a_traceback(tmp_path, number):
    run = Run(tmp_path / "run", 1, f"dataloader.train.seconds={LONG}")
    process = run.start()
    run.until(lambda: (run.folder / "config.yaml").exists(), process)
    os.killpg(process.pid, number)
    assert process.wait(LONG) == (130 if number == signal.SIGINT else -number)
    assert run.output().count("interrupted") == (number == signal.SIGINT)
    assert "Traceback" not in run.output(), run.output()


def test_ctrl_c_while_a_launcher_starts_its_processes_prints_one_line(tmp_path):
    run = Run(tmp_path / "run", 2)
    process = run.start_command()  # they import everything again
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    run.until(lambda: len(children.read_text().split()) >= 3, process)  # with their tracker
    # Two of them are importing, but no longer NumPy, whose C code makes an ImportError of it.
    maps = [Path(f"/proc/{pid}/maps") for pid in children.read_text().split()]
    run.until(lambda: sum("libtorch_python" in m.read_text() for m in maps) == 2, process)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LONG) in (130, 128 + signal.SIGUSR2), run.output()
    lines = [line for line in run.output().splitlines() if "arning" not in line]
    assert len(lines) == 1 and ("interrupted" in lines[0] or "stopped by SIGINT" in lines[0])


def test_ctrl_c_while_a_tool_imports_prints_one_line(tmp_path):
    code = (
        "from region_pretrain.warnings import ignore_library_warnings\n"
        "ignore_library_warnings()\n"
        "import os, signal\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "interrupted\n")


def test_a_process_that_is_killed_ends_the_run_with_one_line(tmp_path, gate):
    run = Run(tmp_path / "run", 2)
    process = run.start()
    run.wait_for(7, process)
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    gate.touch()
    assert process.wait(LONG) == 128 + signal.SIGKILL, run.output()
    assert_one_line(run.output(), "of 2 died from SIGKILL; --resume continues the run")
    assert run.finish("resume=True") == 0


def test_the_main_process_may_close_its_writers_when_a_run_is_stopped(tmp_path, gate, monkeypatch):
    """The others have none; the first one that exits makes the launcher end the rest."""
    monkeypatch.setenv("WRITERS_CLOSED", str(tmp_path / "closed"))
    run = Run(tmp_path / "run", 2)
    process = run.start()
    run.wait_for(3, process)
    os.kill(process.pid, signal.SIGTERM)
    gate.touch()
    assert process.wait(LONG) == STOPPED, run.output()
    assert (tmp_path / "closed").exists()


def test_the_parents_death_lets_its_processes_save(tmp_path, gate, monkeypatch):
    monkeypatch.setattr(engine_run, "hold", functools.partial(lease.hold, patience=LONG))
    run = Run(tmp_path / "run", 2)
    process = run.start()
    run.wait_for(3, process)
    os.kill(process.pid, signal.SIGKILL)
    gate.touch()
    process.wait(LONG)
    assert run.finish("resume=True") == 0, run.output()  # waits until they have ended
    assert len(run.losses()) == 20


def test_no_process_waits_for_others_after_its_launcher_was_killed(tmp_path, monkeypatch):
    def connect(host, port, rank, world_size, **settings):
        (tmp_path / str(rank)).touch()
        with socket.socket() as listener:  # nobody listens on its port after this
            listener.bind((host, 0))
            port = listener.getsockname()[1]
        return TCPStore(host, port, world_size, False, timedelta(seconds=2 * LONG))

    monkeypatch.setattr(processes, "meet", connect)
    run = Run(tmp_path / "run", 2)
    process = run.start()
    run.until(lambda: all((tmp_path / rank).exists() for rank in "01"), process)
    time.sleep(0.5)  # both are inside of PyTorch's loop
    os.kill(process.pid, signal.SIGKILL)
    process.wait(LONG)
    deadline = time.monotonic() + LONG
    while left := processes_of(process.pid):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_a_process_whose_launcher_has_gone_before_it_could_notice_ends():
    url = "roll-call://127.0.0.1:1?rank=1&world_size=2&local_size=2&parent=1"
    with pytest.raises(SystemExit):
        next(processes._roll_call(url))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
