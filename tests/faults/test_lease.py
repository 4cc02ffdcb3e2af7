"""Two processes that want the same output folder."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace

import pytest
from forked import LONG

from region_pretrain import lease
from region_pretrain.errors import UserError
from region_pretrain.lease import Holder, hold, holder_of

#: Counts processes in the critical section: one that finds a living one there exits with 3.
ENTER = """
import os, random, sys, time
from region_pretrain import lease
from region_pretrain.errors import UserError
folder, gates, rng = sys.argv[1], sys.argv[2], random.Random(int(sys.argv[3]))
mine = os.path.join(gates, "ready" + sys.argv[3])
open(mine, "w").close()
while not os.path.exists(os.path.join(gates, "start")):
    time.sleep(0.01)
done = 0
while not os.path.exists(os.path.join(gates, "stop")):
    try:
        with lease.hold(folder, patience=0):
            inside = os.path.join(folder, "inside")
            if os.path.exists(inside):
                other, start = open(inside).read().split()
                if lease.process_start(int(other)) == start:
                    sys.exit(3)
            with open(inside + str(os.getpid()), "w") as f:
                f.write(f"{os.getpid()} {lease.process_start(os.getpid())}")
            os.replace(inside + str(os.getpid()), inside)
            time.sleep(rng.random() * 0.01)
            if rng.random() < 0.05 and int(sys.argv[3]) < 4:
                os.kill(os.getpid(), 9)
            os.remove(inside)
            done += 1
            with open(mine, "a") as f:
                f.write(".")
    except UserError:
        time.sleep(rng.random() * 0.003)
print(done)
"""


def start(code, *arguments):
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)


def until(condition):
    deadline = time.monotonic() + LONG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def write_holder(folder, **changes):
    """A lease of this process, changed to that of another one."""
    path = folder / lease.PREFIX / "7"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(replace(Holder.this_process(), **changes))))
    return path


def test_processes_that_start_together_and_are_killed_never_hold_it_together(tmp_path):
    gates = tmp_path / "gates"
    gates.mkdir()
    running = [start(ENTER, tmp_path, gates, seed) for seed in range(6)]
    until(lambda: len(os.listdir(gates)) == 6)
    (gates / "start").touch()
    # Those that are not killed: the others' numbers are lost.
    until(lambda: sum((gates / f"ready{seed}").stat().st_size for seed in (4, 5)) > 20)
    until(lambda: any(process.poll() == -signal.SIGKILL for process in running))
    (gates / "stop").touch()
    ended = [process.communicate(timeout=LONG) for process in running]
    codes = [process.returncode for process in running]
    assert set(codes) <= {0, -signal.SIGKILL} and -signal.SIGKILL in codes, ended
    assert sum(int(out) for out, _ in ended if out) > 20
    assert {name for name in os.listdir(tmp_path) if name.startswith("inside")} <= {"inside"}
    (number,) = os.listdir(tmp_path / lease.PREFIX)
    assert int(number) > 20


KILLED_AT = """
import os, sys
from region_pretrain import lease
calls = []
def trace(event, arguments):
    path = str(arguments[0]) if arguments else ""
    if event in ("open", "os.link", "os.remove") and ".lease" in path:
        calls.append(path)
        if len(calls) == int(sys.argv[2]):
            os.kill(os.getpid(), 9)
sys.addaudithook(trace)
with lease.hold(sys.argv[1], patience=0):
    pass
"""


def test_a_kill_while_a_lease_is_created_or_released_leaves_no_riddle(tmp_path):
    codes = []
    for call in range(1, 20):
        codes.append(start(KILLED_AT, tmp_path, call).wait(LONG))
        began = time.monotonic()
        with hold(str(tmp_path), patience=0):
            (name,) = os.listdir(tmp_path / lease.PREFIX)
            assert name.isdecimal()
        assert time.monotonic() - began < 60  # it did not wait for a sign of life
        if codes[-1] == 0:
            break
    assert len(codes) > 5 and set(codes[:-1]) == {-signal.SIGKILL} and codes[-1] == 0


def test_without_hard_links_a_lease_is_exclusive_too(tmp_path, monkeypatch):
    def link(*names):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", link)
    with hold(str(tmp_path)), pytest.raises(UserError), hold(str(tmp_path), patience=0):
        pass
    monkeypatch.setattr(lease, "_newest", lambda folder: (1, None, 0.0))
    assert lease._create(str(tmp_path / lease.PREFIX), 1) is None  # has been created


def test_a_lost_answer_of_a_file_server_is_no_other_holder(tmp_path, monkeypatch):
    link = os.link

    def lost(*names):
        link(*names)
        raise FileExistsError(17, "File exists")

    monkeypatch.setattr(os, "link", lost)
    with hold(str(tmp_path), patience=0):
        assert holder_of(str(tmp_path)).pid == os.getpid()


def test_a_second_one_is_refused_and_told_who_holds_it(tmp_path):
    with hold(str(tmp_path)):
        assert holder_of(str(tmp_path)).pid == os.getpid()
        with pytest.raises(UserError) as refused, hold(str(tmp_path), what="run", patience=0):
            pass
    text = str(refused.value)
    host = os.uname().nodename
    assert text.startswith(f"run is in use by process {os.getpid()} on {host} since 20")
    assert f"kill {os.getpid()}" in text and "\n" not in text
    assert text.endswith(f"if it no longer runs, delete {tmp_path / lease.PREFIX}")
    assert holder_of(str(tmp_path)) is None
    with hold(str(tmp_path), patience=0), hold(str(tmp_path), name=".lease-1", patience=0):
        pass  # two leases in one folder


def test_it_is_free_again_after_an_error_or_an_exit(tmp_path):
    with pytest.raises(KeyError), hold(str(tmp_path)):
        raise KeyError
    code = "import sys; from region_pretrain.lease import hold\nwith hold(sys.argv[1]): sys.exit(4)"
    assert start(code, tmp_path).wait(LONG) == 4
    assert (tmp_path / lease.PREFIX / "2").read_text().strip() == "{}"
    with hold(str(tmp_path), patience=0):
        assert os.listdir(tmp_path / lease.PREFIX) == ["3"]


def test_a_process_that_ended_or_became_another_is_replaced(tmp_path):
    ended = subprocess.Popen(["true"])
    while lease.process_start(ended.pid) is not None:  # a zombie counts as ended
        time.sleep(0.01)
    for changes in ({"pid": ended.pid, "started": "1"}, {"started": "1"}):
        write_holder(tmp_path, **changes)
        with hold(str(tmp_path), patience=0):
            assert os.listdir(tmp_path / lease.PREFIX) == ["8"]
        os.remove(tmp_path / lease.PREFIX / "8")
    ended.wait()


def test_an_earlier_start_of_the_same_slurm_job_is_replaced(tmp_path, monkeypatch):
    naps = []
    monkeypatch.setattr(lease.time, "sleep", naps.append)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    there = {"machine": "elsewhere", "host": "node7", "job": "77"}
    write_holder(tmp_path, **there, restart=1)
    with hold(str(tmp_path), patience=0):
        assert naps == [1.5 * lease._BEAT_SECONDS]  # an earlier process may still be running
    monkeypatch.undo()
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.3)
    monkeypatch.setattr(lease, "_LONGEST_LOOK", 0.05)  # also if this process is slow
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    with refused_by_living(write_holder(tmp_path, **there, restart=2)) as error:
        assert "on node7 (SLURM job 77) since" in error
    with refused_by_living(write_holder(tmp_path, **there | {"job": "78"}, restart=1)):
        pass


class refused_by_living:
    """A context with the message to a process that finds a lease which is kept alive."""

    def __init__(self, path):
        self.path, self.done = path, threading.Event()

    def _touch(self):
        while not self.done.wait(0.05):
            os.utime(self.path)

    def __enter__(self):
        for path in self.path.parent.iterdir():
            if path != self.path:
                path.unlink()
        thread = threading.Thread(target=self._touch)
        thread.start()
        try:
            with (
                pytest.raises(UserError) as refused,
                hold(str(self.path.parents[1]), patience=0.2),
            ):
                pass
        finally:
            self.done.set()
            thread.join()
        return str(refused.value)

    def __exit__(self, *error):
        return False


def test_a_silent_holder_on_another_machine_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.4)
    monkeypatch.setattr(lease, "_LONGEST_LOOK", 0.05)
    path = write_holder(tmp_path, machine="elsewhere", host="node7")
    with refused_by_living(path) as error:
        assert "on node7 since" in error
    os.utime(path, (2e9, 2e9))  # clocks may differ between machines, or jump
    began = time.monotonic()
    with hold(str(tmp_path), patience=0):
        assert 0.4 <= time.monotonic() - began < 100  # 180 s by default
    assert "waiting up to 0 s for a sign of life" in caplog.text


def test_while_the_file_system_stalls_nobody_counts_as_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.5)
    monkeypatch.setattr(lease, "_LONGEST_LOOK", 0.1)
    path = write_holder(tmp_path, machine="elsewhere", host="node7")
    newest, looks = lease._newest, []

    def stalls_once(folder):
        looks.append(time.monotonic())
        if len(looks) == 2:
            time.sleep(1.0)  # the holder's sign of life waits as well
            threading.Timer(0.2, os.utime, (path,)).start()
        return newest(folder)

    monkeypatch.setattr(lease, "_newest", stalls_once)
    with pytest.raises(UserError, match="in use by .* on node7"), hold(str(tmp_path), patience=0.2):
        pass
    assert looks[2] - looks[0] > 1.0 and os.listdir(tmp_path / lease.PREFIX) == ["7"]


def test_who_has_just_replaced_a_silent_holder_is_not_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.4)
    write_holder(tmp_path, machine="elsewhere", host="node7")
    create = lease._create

    def slower(folder, number):
        if number == 8:  # another machine replaces it at the same instant
            text = (tmp_path / lease.PREFIX / "7").read_text().replace("node7", "node8")
            (tmp_path / lease.PREFIX / "8").write_text(text)
        return create(folder, number)

    monkeypatch.setattr(lease, "_create", slower)
    began = time.monotonic()
    with hold(str(tmp_path), patience=0):
        # twice: it has waited for node7 and then for node8
        assert time.monotonic() - began >= 0.8


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}', "\0"])
def test_an_incomplete_file_is_a_holder_that_gives_no_sign_of_life(tmp_path, monkeypatch, text):
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.2)
    write_holder(tmp_path).write_text(text)
    with hold(str(tmp_path), patience=0):
        assert os.listdir(tmp_path / lease.PREFIX) == ["8"]


SUSPENDED = """
import sys, time
from region_pretrain import lease
lease.machine = lambda: "elsewhere"
lease._BEAT_SECONDS = 0.1
with lease.hold(sys.argv[1]):
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_holder_that_was_suspended_and_replaced_exits(tmp_path, monkeypatch):
    process = start(SUSPENDED, tmp_path)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(lease, "_SILENCE_SECONDS", 0.4)
    with hold(str(tmp_path), patience=0):
        process.send_signal(signal.SIGCONT)
        _, error = process.communicate(timeout=LONG)
        assert process.returncode == 2
        assert error.startswith(f"error: {tmp_path} was taken over by another process")
        assert error.count("\n") == 1
        assert holder_of(str(tmp_path)).pid == os.getpid()


def test_a_folder_that_cannot_be_written_to_is_an_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError), hold(str(tmp_path / "file")):
        pass


def test_it_does_not_import_pytorch():
    code = "import region_pretrain.lease, sys; print(*sys.modules)"
    modules = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    assert "region_pretrain.lease" in modules and "torch" not in modules
