import json
import logging

import pytest
from detectron2.utils.events import EventStorage, JSONWriter
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from region_pretrain.config import complete_train
from region_pretrain.engine import writers
from region_pretrain.engine.writer_list import build_writers
from region_pretrain.engine.writers import ConsoleWriter, ProgressWriter, drop_lines_from
from region_pretrain.metrics import newest_metrics
from region_pretrain.progress import Progress, read_progress


def test_lines_after_the_resumed_checkpoint_are_removed(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [json.dumps({"iteration": i, "total_loss": 1 / (i + 1)}) + "\n" for i in range(6)]
    path.write_text("".join(lines) + '{"iteration": 6, "total_lo')
    drop_lines_from(str(path), 4)
    assert path.read_text() == "".join(lines[:4])
    drop_lines_from(str(path), 0)
    assert path.read_text() == ""
    drop_lines_from(str(tmp_path / "absent.json"), 4)
    assert not (tmp_path / "absent.json").exists()


def test_a_line_without_its_newline_does_not_swallow_the_next(tmp_path):
    path = tmp_path / "metrics.json"
    path.write_text('{"iteration": 0, "a": 1.0}')
    drop_lines_from(str(path), 1)
    writer = JSONWriter(str(path))
    with EventStorage(1) as storage:
        storage.put_scalar("a", 2.0)
        writer.write()
    writer.close()
    assert [json.loads(line)["a"] for line in path.read_text().splitlines()] == [1.0, 2.0]
    assert newest_metrics(str(path)) == {"iteration": 1, "a": 2.0}


def test_console_line(caplog):
    writer = ConsoleWriter(max_iter=100)
    with EventStorage(39) as storage, caplog.at_level(logging.INFO):
        values = {
            "total_loss": 3.25,
            "loss_a": 2.0,
            "loss_b": 1.25,
            "lr": 0.08,
            "img_per_sec": 512.0,
            "data_time": 0.5,
            "time": 2.0,
            "peak_memory_mib": 812.4,
        }
        storage.put_scalars(**values)
        writer.write()
        writer.write()  # nothing new
    assert [r.getMessage() for r in caplog.records] == [
        "iter 40/100  total_loss 3.25  (loss_a 2, loss_b 1.25)  lr 0.08  512.0 img/s  data 25%  "
        "eta 0:02:00  max mem 812M"
    ]


def test_a_resumed_run_has_each_iteration_once_in_file_and_tensorboard(tmp_path):
    cfg = complete_train(OmegaConf.create({"train": {"output_dir": str(tmp_path)}}))

    def write(start, stop, scale):
        with EventStorage(start) as storage:
            all_writers = build_writers(cfg, start, 6)
            for storage.iter in range(start, stop):
                storage.put_scalars(
                    total_loss=scale * storage.iter, time=1.0, data_time=0.0, img_per_sec=1.0
                )
                for writer in all_writers:
                    writer.write()
            for writer in all_writers:
                writer.close()

    write(0, 5, scale=1.0)
    write(3, 6, scale=10.0)
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(d["iteration"], d["total_loss"]) for d in lines] == expected
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("total_loss")
    assert [(e.step, e.value) for e in events] == expected


def test_progress_is_written_at_most_once_per_second_and_at_the_end(tmp_path, monkeypatch):
    path, now, written = str(tmp_path / "progress.json"), 0.0, []
    monkeypatch.setattr(writers.time, "monotonic", lambda: now)
    monkeypatch.setattr(writers, "write_progress", lambda path, progress: written.append(progress))
    with EventStorage(4) as storage:
        writer = ProgressWriter(path, start_iter=4, max_iter=12)
        for storage.iter in range(4, 12):
            now += 0.4
            storage.put_scalars(total_loss=1.0, time=0.4)
            writer.write()
        writer.write()
        writer.close()
    assert [(p.done, p.total) for p in written] == [(4, 12), (5, 12), (8, 12), (11, 12), (12, 12)]
    assert [p.seconds_left for p in written] == [None] + [
        pytest.approx(seconds) for seconds in (2.8, 1.6, 0.4, 0.0)
    ]


def test_a_stopped_run_leaves_its_newest_progress_and_a_resumed_run_corrects_it(tmp_path):
    path = str(tmp_path / "progress.json")

    def seen():
        progress = read_progress(path)
        return progress.done, progress.total, progress.seconds_left

    assert read_progress(path) is None
    with EventStorage(0) as storage:
        writer = ProgressWriter(path, start_iter=0, max_iter=100)
        assert seen() == (0, 100, None)
        writer.write()  # nothing has been logged yet
        for storage.iter in (0, 9):
            storage.put_scalars(total_loss=1.0, time=2.0)
            writer.write()
        assert seen() == (1, 100, 198.0)  # less than a second ago
        writer.close()
        assert seen() == (10, 100, 180.0)
    ProgressWriter(path, start_iter=5, max_iter=100)  # the last checkpoint was after iteration 4
    assert seen() == (5, 100, None)


def test_the_console_and_the_file_show_the_same_estimate(tmp_path, caplog):
    with EventStorage(0) as storage, caplog.at_level(logging.INFO):
        cfg = complete_train(OmegaConf.create({"train": {"output_dir": str(tmp_path)}}))
        all_writers = build_writers(cfg, 0, 40)
        storage.iter = 19
        storage.put_scalars(total_loss=1.0, time=3.5, data_time=0.0, img_per_sec=1.0)
        for writer in all_writers:
            writer.write()
    progress = read_progress(str(tmp_path / "progress.json"))
    assert progress == Progress(20, 40, 73.5 - 3.5, progress.updated)
    assert "iter 20/40" in caplog.text and "eta 0:01:10" in caplog.text
