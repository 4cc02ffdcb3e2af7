"""Regions whose boxes come from a network that is slower than the workers."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor, wait

import numpy as np
import pytest
from forked import LONG, Process

from region_pretrain.engine.image_boxes import ImageBoxes
from region_pretrain.errors import UserError
from region_pretrain.images import UnreadableImage, read_image
from region_pretrain.regions import RegionStore, generate
from region_pretrain.regions.elsewhere.matching import Given
from region_pretrain.regions.elsewhere.recipe import DetectorRecipe
from region_pretrain.regions.generate import make_regions

RECIPE = DetectorRecipe("detector", source="x")


class Network(ImageBoxes):
    """Finds one box in the upper left of each image."""

    def read(self, record):
        if record.get("gone"):
            raise UnreadableImage(f"{record['file_name']}: Stale\nfile handle")
        return read_image(record["file_name"])

    def find(self, inputs):
        box = np.array([[0, 0, 20, 30]], np.float32)
        return [Given(box, np.ones(1, np.float32), None, "x") for _ in inputs]


def test_finished_parts_are_written_while_the_network_works(tmp_path, records, monkeypatch):
    out, written, futures = str(tmp_path / "r.arrow"), [], []

    class Workers(ProcessPoolExecutor):
        def submit(self, *arguments):
            futures.append(super().submit(*arguments))
            return futures[-1]

    def prepare(some):
        for record in Network(1)(some):
            yield record
            wait(futures, LONG)  # the workers have finished all images so far
            parts = os.listdir(f"{out}.parts")
            written.append(sum(name.startswith("part-") for name in parts))

    monkeypatch.setattr(generate, "ProcessPoolExecutor", Workers)
    make_regions(records, out, RECIPE, workers=2, part_size=2, prepare=prepare)
    # Each part is complete soon after its last image, not only when two more parts are read.
    assert len(written) >= 10 and written[4] >= 1 and written[9] >= 4


def test_an_image_that_could_not_be_read_is_listed(tmp_path, records):
    out = str(tmp_path / "r.arrow")
    records[3]["gone"] = True  # the file itself is intact
    summary = make_regions(records, out, RECIPE, 2, max_unreadable=0.1, prepare=Network(4))
    assert (summary["images"], summary["unreadable"], summary["without"]) == (10, 1, 0)
    line = open(f"{out}.unreadable.txt").read()
    assert line == f"im/3\t{records[3]['file_name']}: Stale file handle\n"
    del records[3]["gone"]
    summary = make_regions(records, out, RECIPE, 2, max_unreadable=0.1, prepare=Network(4))
    assert (summary["images"], summary["unreadable"]) == (11, 0)
    assert RegionStore.open(out).boxes("im/3").tolist() == [[0, 0, 20, 30]]


def test_workers_are_forked_before_the_readers_hold_locks(tmp_path, records, monkeypatch):
    lock = threading.Lock()

    def read(path, *args, original=read_image):
        with lock:  # as of a cache of headers
            time.sleep(0.05)
            return original(path)

    monkeypatch.setattr(sys.modules[__name__], "read_image", read)
    monkeypatch.setattr(generate, "read_record", lambda record: read(record["file_name"]))
    out = tmp_path / "r.arrow"
    process = Process(
        lambda: make_regions(records, str(out), RECIPE, 2, prepare=Network(2)), tmp_path / "log"
    )
    try:
        assert process.wait(LONG) == 0, (tmp_path / "log").read_text()
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert len(RegionStore.open(str(out))) == 11


def test_an_interrupt_prints_no_traceback_of_idle_workers(tmp_path, records):
    def prepare(some):
        yield from Network(1)(some[:1])
        (tmp_path / "waiting").touch()
        time.sleep(LONG)

    def run():
        try:
            make_regions(records, str(tmp_path / "r.arrow"), RECIPE, 3, prepare=prepare)
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    process = Process(run, tmp_path / "log")
    deadline = time.monotonic() + LONG
    while not (tmp_path / "waiting").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(LONG) == 130
    assert "Traceback" not in (tmp_path / "log").read_text()


def test_a_file_system_without_locks_is_named(tmp_path, records, monkeypatch):
    def lock(*args, **kwargs):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("portalocker.portalocker.LOCKER", lock)
    with pytest.raises(UserError, match=r"cannot lock .*r\.arrow\S* .*-o flock"):
        make_regions(records, str(tmp_path / "r.arrow"), "grid-v1", workers=1)
