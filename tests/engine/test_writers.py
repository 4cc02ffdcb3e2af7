import json
import logging

from detectron2.utils.events import EventStorage, JSONWriter
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from region_pretrain.engine.writers import (
    ConsoleWriter,
    build_writers,
    drop_lines_from,
)
from region_pretrain.metrics import newest_metrics


def test_lines_after_the_resumed_checkpoint_are_taken_back(tmp_path):
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
        }
        storage.put_scalars(**values)
        writer.write()
        writer.write()  # nothing new
    assert [r.getMessage().split("  max mem")[0] for r in caplog.records] == [
        "iter 40/100  total_loss 3.25  (loss_a 2, loss_b 1.25)  lr 0.08  512.0 img/s  data 25%  "
        "eta 0:02:00"
    ]


def test_a_resumed_run_has_each_iteration_once_in_file_and_tensorboard(tmp_path):
    def write(start, stop, scale):
        with EventStorage(start) as storage:
            writers = build_writers(str(tmp_path), start, 6)
            for storage.iter in range(start, stop):
                storage.put_scalars(
                    total_loss=scale * storage.iter, time=1.0, data_time=0.0, img_per_sec=1.0
                )
                for writer in writers:
                    writer.write()
            for writer in writers:
                writer.close()

    write(0, 5, scale=1.0)
    write(3, 6, scale=10.0)
    expected = [(0, 0.0), (1, 1.0), (2, 2.0), (3, 30.0), (4, 40.0), (5, 50.0)]
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert [(d["iteration"], d["total_loss"]) for d in lines] == expected
    events = EventAccumulator(str(tmp_path)).Reload().Scalars("total_loss")
    assert [(e.step, e.value) for e in events] == expected
