"""A network file system that stalls: a FUSE mount whose process is suspended."""

import functools
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from equality import equal
from forked import LONG, Process
from soak import MethodRun, make_config, make_images
from tiny_run import final_checkpoint

from region_pretrain import lease
from region_pretrain.engine import run as engine_run
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import exit_on_user_error

STALL_SECONDS = 4.0


class Mount:
    """A mounted folder that can be made to stall.

    Args:
        folder: contains the files and the mount point.
    """

    def __init__(self, folder: Path) -> None:
        self.path, files = folder / "mounted", folder / "files"
        self.path.mkdir(), files.mkdir()
        self._server = subprocess.Popen(["bindfs", "-f", str(files), str(self.path)])
        deadline = time.monotonic() + LONG
        while not os.path.ismount(self.path):
            assert time.monotonic() < deadline and self._server.poll() is None
            time.sleep(0.01)

    def stall(self) -> None:
        self._server.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        self._server.send_signal(signal.SIGCONT)

    def unmount(self) -> None:
        self.go_on()
        program = next(filter(shutil.which, ("fusermount3", "fusermount")))  # FUSE 3, FUSE 2
        subprocess.run([program, "-uz", str(self.path)], check=True)
        self._server.wait(LONG)


@pytest.fixture
def mount(tmp_path):
    if shutil.which("bindfs") is None or not os.access("/dev/fuse", os.W_OK):
        pytest.skip("no FUSE: apt-get install bindfs")
    mounted = Mount(tmp_path)
    yield mounted
    mounted.unmount()


class Waits(HookBase):
    """After the 20th iteration, waits for a file."""

    def __init__(self, path: str) -> None:
        self._path = path

    def after_step(self) -> None:
        deadline = time.monotonic() + LONG
        while self.trainer.iter == 19 and not os.path.exists(self._path):
            assert time.monotonic() < deadline
            time.sleep(0.01)


def config(folder):
    cfg = make_config("SoCo", *make_images(folder))
    cfg.train.max_iter = 40
    return cfg


def test_a_run_waits_for_its_disk_and_keeps_its_folder(mount, tmp_path, monkeypatch):
    for name, seconds in (("BEAT", 0.2), ("SILENCE", 1.5), ("STUCK", 1.0)):
        monkeypatch.setattr(lease, f"_{name}_SECONDS", seconds)
    reference = MethodRun(tmp_path / "whole", config(tmp_path), 1)
    assert reference.start().wait(LONG) == 0, reference.output()
    # Images, regions and output are on the mounted disk.
    cfg = config(mount.path)
    cfg.train.output_dir = str(mount.path / "run")
    # It must not end, and leave its folder, before the second run has looked at it.
    refused = tmp_path / "refused"
    cfg.train.hooks = [L(Waits)(path=str(refused))]
    run = MethodRun(mount.path / "run", cfg, 1)
    run.out = tmp_path / "run.out"
    process = run.start(workers=1)
    run.wait_for(5, process)

    @exit_on_user_error
    def from_another_machine() -> None:
        lease.machine = lambda: "elsewhere"
        engine_run.hold = functools.partial(lease.hold, patience=0.3)
        do_pretrain(cfg, resume=True)

    mount.stall()
    second = Process(from_another_machine, tmp_path / "second.out")
    time.sleep(STALL_SECONDS)
    assert process.poll() is None and second.poll() is None
    mount.go_on()
    assert second.wait(LONG) == 2
    text = (tmp_path / "second.out").read_text()
    assert "is in use by process" in text and text.count("error") == 1, text
    refused.touch()
    assert process.wait(LONG) == 0, run.output()
    stuck = f"{mount.path / 'run'}: the file system has not answered for 1 s; waiting"
    assert run.output().count(stuck) == 1
    assert run.done() == 40 and run.losses() == reference.losses()
    a, b = (final_checkpoint(folder) for folder in (run.folder, reference.folder))
    assert a.pop("data") != b.pop("data")  # the fingerprint contains paths
    assert equal(a, b)
