"""``train.writers``: names, lazy objects, and what is refused before anything is loaded."""

import csv
import importlib.util
import random
import sys

import numpy
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.utils.events import EventStorage, EventWriter, get_event_storage
from omegaconf import OmegaConf
from tiny_run import final_checkpoint, make_config, make_detection_config

from region_pretrain.config import complete_train, load_config
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.writer_list import build_writers, check_writers
from region_pretrain.errors import UserError
from region_pretrain.metrics import read_metrics
from region_pretrain.sweeps.configs import content


class ListWriter(EventWriter):
    """Appends to a list; fails at an iteration."""

    written: list = []

    def __init__(self, fails_at: int = -1):
        self._fails_at = fails_at

    def write(self) -> None:
        iteration = get_event_storage().iter
        random.random(), torch.rand(1)
        if iteration == self._fails_at:
            raise OSError(28, "No space left on device")
        self.written.append(iteration)


@pytest.mark.parametrize(
    "writers, message",
    [
        (["json", "wand"], "there is no writer 'wand'; did you mean wandb?"),
        (["json", "x"], "there is no writer 'x'. The names are console, json"),
        (["console"], "train.writers must contain json"),
        (["json", {"name": "csv"}], "is neither a name nor"),
    ],
)
def test_wrong_writers(writers, message):
    with pytest.raises(UserError) as error:
        check_writers(OmegaConf.create({"writers": writers, "tracking": {"tags": []}}))
    assert message in str(error.value)


@pytest.mark.parametrize("tags", ["first", ["a", ""], [3], ["x" * 65], 3, {"a": 1}])
def test_tags_that_a_service_would_refuse(tags):
    train = OmegaConf.create({"writers": ["json", "wandb"], "tracking": {"tags": tags}})
    with pytest.raises(UserError, match="^train.tracking.tags=.*1 to 64 characters"):
        check_writers(train)
    train.tracking.tags = ["x" * 64, "Größe"]
    check_writers(train)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
@pytest.mark.parametrize("remains", ["nothing", "its folder"])
def test_an_absent_package_is_one_line_that_names_the_extra(tmp_path, monkeypatch, name, remains):
    monkeypatch.chdir(tmp_path)
    if remains == "its folder":  # a namespace package
        (tmp_path / name).mkdir()
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    importlib.invalidate_caches()
    cfg = make_config(tmp_path / "run", writers=["json", name])
    with pytest.raises(UserError) as error:
        do_pretrain(cfg)
    assert str(error.value) == (
        f"train.writers contains {name}, which is not installed: pip install "
        f"'region_pretrain[{name}]'"
    )
    assert not (tmp_path / "run").exists()


def test_names_on_the_command_line(tmp_path):
    path = "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
    assert list(load_config(path).train.writers) == ["console", "json", "tensorboard"]
    cfg = load_config(path, ["train.writers=[json,csv,wandb]", "train.tracking.project=mine"])
    assert list(cfg.train.writers) == ["json", "csv", "wandb"]
    assert cfg.train.tracking.project == "mine" and cfg.train.tracking.seconds == 60


@pytest.mark.parametrize("fine_tune", [False, True])
def test_only_the_listed_writers_write(tmp_path, fine_tune):
    make, do = (make_detection_config, do_train) if fine_tune else (make_config, do_pretrain)
    do(make(tmp_path, writers=["json", "csv"]))
    names = {path.name for path in tmp_path.iterdir()}
    assert {"metrics.json", "metrics.csv", "progress.json"} <= names
    assert not any(name.startswith("events.") for name in names)
    assert "img/s" not in (tmp_path / "log.txt").read_text()


def test_csv_has_the_content_of_metrics_json_after_resuming_from_an_earlier_checkpoint(tmp_path):
    cfg = complete_train(OmegaConf.create({"train": {"output_dir": str(tmp_path)}}))
    cfg.train.writers = ["json", "csv"]

    def write(start, stop, scale):
        with EventStorage(start) as storage:
            writers = build_writers(cfg, start, 6)
            for storage.iter in range(start, stop):
                storage.put_scalars(total_loss=scale * storage.iter, time=1.0)
                if storage.iter == 4:
                    storage.put_scalar("bbox/AP, mean", 12.5)
                for writer in writers:
                    writer.write()
            for writer in writers:
                writer.close()

    def table():
        with open(tmp_path / "metrics.csv", newline="") as file:
            rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
        assert rows == read_metrics(str(tmp_path))
        return {row["iteration"]: row["total_loss"] for row in rows}

    write(0, 5, scale=1.0)
    assert table() == {0: 0.0, 1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    write(3, 6, scale=10.0)
    assert table() == {0: 0.0, 1: 1.0, 2: 2.0, 3: 30.0, 4: 40.0, 5: 50.0}
    assert (tmp_path / "metrics.csv").read_text().startswith('iteration,"bbox/AP, mean",time,')


def test_writers_and_pictures_repeat_no_run_of_a_sweep():
    path = "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
    other = ["train.writers=[json]", "train.tracking.project=x", "train.pictures.period=0"]
    assert content(load_config(path)) == content(load_config(path, other))
    assert content(load_config(path)) != content(load_config(path, ["train.log_period=7"]))


def test_a_writer_of_the_user_may_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(ListWriter, "written", [])
    cfg = make_config(tmp_path, writers=["json", L(ListWriter)(fails_at=3)])
    do_pretrain(cfg)
    assert ListWriter.written == [i for i in range(20) if i != 3] + [20]
    do_pretrain(make_config(tmp_path / "plain"))
    ours, plain = (final_checkpoint(folder) for folder in (tmp_path, tmp_path / "plain"))
    assert torch.equal(ours["rng"][0]["torch"], plain["rng"][0]["torch"])
    assert ours["rng"][0]["python"] == plain["rng"][0]["python"]
    log = (tmp_path / "log.txt").read_text()
    assert log.count("ListWriter failed: OSError: [Errno 28] No space left on device") == 1
    assert len(read_metrics(str(tmp_path))) == 20


class NamedAtRandom(ListWriter):
    def __init__(self):
        super().__init__()
        self.name = f"{torch.rand(1).item()} {random.random()} {numpy.random.rand()}"


def test_making_a_writer_of_the_user_draws_none_of_the_runs_numbers(tmp_path):
    do_pretrain(make_config(tmp_path / "named", writers=["json", L(NamedAtRandom)()]))
    do_pretrain(make_config(tmp_path / "plain"))
    ours, plain = (final_checkpoint(tmp_path / name)["rng"][0] for name in ("named", "plain"))
    assert torch.equal(ours["torch"], plain["torch"]) and ours["python"] == plain["python"]
