"""Damaged metrics, and disks that fill while a run writes."""

import errno
import json
import os

import pytest
from damage import changes, fuzz
from detectron2.utils.events import JSONWriter
from hypothesis import given
from tiny_run import CLOCK, make_config

from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError
from region_pretrain.metrics import newest_metrics, read_metrics
from region_pretrain.progress import Progress, read_progress, write_progress


@pytest.mark.parametrize(
    "content", [b"\xff\xfe\x00\x80\n", b"[1]\nnull\n7\n", b"[" * 100_000, b'{"iteration": [1]}\n']
)
def test_metrics_without_an_intact_line_are_no_metrics(tmp_path, content):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="metrics.json has no metrics"):
        read_metrics(str(path))
    assert newest_metrics(str(tmp_path)) == {}
    path.write_bytes(content + b'\n{"iteration": 3, "x": 1}\n')
    assert read_metrics(str(path)) == [{"iteration": 3, "x": 1}]


def test_fuzzed_progress(tmp_path):
    path = tmp_path / "progress.json"
    write_progress(str(path), Progress(3, 10, 1.5))
    data = path.read_bytes()

    @fuzz(200)
    @given(change=changes())
    def run(change):
        path.write_bytes(change(data))
        found = read_progress(str(path))
        assert found is None or isinstance(found.done + found.total + found.updated, int | float)

    run()
    path.write_bytes(data)
    os.utime(path, (0, 7))
    assert read_progress(str(path)) == Progress(3, 10, 1.5, 7.0)


def lines(folder):
    rows = map(json.loads, (folder / "metrics.json").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in rows]


def test_a_resumed_run_drops_damaged_lines_and_repeats_the_others(tmp_path):
    do_pretrain(make_config(tmp_path, checkpointer={"period": 6, "max_to_keep": None}))
    whole = lines(tmp_path)
    os.remove(tmp_path / "model_final.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000011.pth")
    metrics = (tmp_path / "metrics.json").read_bytes().splitlines(keepends=True)
    metrics[3] = b"\x80\xff" + metrics[3]
    (tmp_path / "metrics.json").write_bytes(b"".join(metrics) + bytes(100))
    (tmp_path / "model_0000017.pth").write_bytes(b"")
    do_pretrain(make_config(tmp_path), resume=True)
    assert lines(tmp_path) == whole[:3] + whole[4:]


def test_metrics_that_are_a_folder_are_one_line(tmp_path):
    (tmp_path / "run" / "metrics.json").mkdir(parents=True)
    with pytest.raises(UserError, match="metrics.json is not a file: move it away"):
        do_pretrain(make_config(tmp_path / "run"), resume=True)


def test_a_disk_that_fills_is_one_line_and_the_run_continues_later(tmp_path, monkeypatch, capfd):
    do_pretrain(make_config(tmp_path / "whole"))
    run, write = tmp_path / "run", JSONWriter.write

    def full(self):
        write(self)
        if len(lines(run)) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JSONWriter, "write", full)
    with pytest.raises(UserError) as error:
        do_pretrain(make_config(run))
    monkeypatch.undo()
    assert str(error.value) == (
        f"no space left in {run}; last good checkpoint: {run}/model_0000005.pth. Free some disk "
        "space and continue with --resume"
    )
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    do_pretrain(make_config(run), resume=True)
    assert lines(run) == lines(tmp_path / "whole")


def test_a_log_that_cannot_be_written_ends_and_the_run_continues(tmp_path, capfd):
    (tmp_path / "log.txt").symlink_to("/dev/full")
    do_pretrain(make_config(tmp_path))
    out, err = capfd.readouterr()
    assert "Traceback" not in out + err
    notes = [line for line in err.splitlines() if "log.txt cannot be written" in line]
    assert len(notes) == 1 and "No space left" in notes[0]
    assert len(lines(tmp_path)) == 20
