"""Runs that write to the real packages in their offline modes."""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.engine import HookBase
from tiny_run import StopAt, final_checkpoint, make_config

from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError
from region_pretrain.metrics import read_metrics
from region_pretrain.tracking.git import git_state
from region_pretrain.tracking.mlflow_service import MlflowService
from region_pretrain.tracking.service import RunInfo, read_tracked

ALL = ["console", "json", "tensorboard", "csv", "wandb", "mlflow"]


class Picture(HookBase):
    """A picture after each fourth iteration."""

    def after_step(self) -> None:
        if self.trainer.iter % 4 == 3:
            picture = torch.full((3, 4, 5), self.trainer.iter, dtype=torch.uint8)
            self.trainer.storage.put_image("pictures/x", picture)


def config(folder, **train):
    tracking = {"project": "tiny", "group": "g", "tags": ["t", "50%"], "seconds": 30}
    cfg = make_config(folder, writers=ALL, tracking=tracking, log_period=2, **train)
    cfg.train.hooks = [L(Picture)(), L(StopAt)()]
    return cfg


def curve(folder, name="total_loss"):
    return {r["iteration"]: r[name] for r in read_metrics(str(folder)) if name in r}


def values(items):
    """Name -> value; a picture has several values, of which one is kept."""
    return {i.key or i.nested_key[0]: json.loads(i.value_json) for i in items}


def history(records):
    """Step -> metrics of an offline attempt of W&B."""
    rows = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            assert record.history.step.num not in rows
            rows[record.history.step.num] = values(record.history.item)
    return rows


def wandb_exit_codes(records):
    """Exit codes other than 0, of interrupted attempts."""
    exits = [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"]
    assert len(exits) == 1
    return [code for code in exits if code]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """A run that was stopped after iteration 15 and resumed from the checkpoint of iteration 11."""
    run = tmp_path_factory.mktemp("resumed") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("STOP_AT", "16")
        do_pretrain(config(run))
    before = read_tracked(str(run))
    seen = curve(run)
    assert max(seen) == 15 and (run / "last_checkpoint").read_text() == "model_0000011.pth"
    do_pretrain(config(run), resume=True)
    assert read_tracked(str(run)) == before and before.keys() == {"wandb", "mlflow"}
    return run


def test_a_resumed_run_keeps_its_ids_and_has_each_step_once(
    resumed, wandb_records, mlflow_client, tmp_path
):
    expected = curve(resumed)
    assert list(expected) == list(range(1, 20, 2))

    attempts = wandb_records(resumed)
    tracked = read_tracked(str(resumed))
    assert [name for name, _ in attempts] == [f"run-{tracked['wandb'].id}"] * 2
    first, second = (history(records) for _, records in attempts)
    assert list(first) == [1, 3, 5, 7, 9, 11, 13, 15] and list(second) == [17, 19]
    assert {i: row["total_loss"] for i, row in (first | second).items()} == expected
    assert [i for i, row in (first | second).items() if "pictures/x" in row] == [3, 7, 11, 15, 19]

    run = mlflow_client.get_run(tracked["mlflow"].id)
    assert run.info.status == "FINISHED" and run.info.run_name == "run"
    assert not wandb_exit_codes(attempts[1][1]) and wandb_exit_codes(attempts[0][1]) == [1]
    for name in ("total_loss", "lr"):
        logged = mlflow_client.get_metric_history(run.info.run_id, name)
        assert [(m.step, m.value) for m in logged] == list(curve(resumed, name).items())
    pictures = [f.path for f in mlflow_client.list_artifacts(run.info.run_id, "images")]
    steps = [int(p.split("+step+")[1].split("+")[0]) for p in pictures if p.endswith(".png")]
    assert sorted(steps) == [3, 7, 11, 15, 19]

    do_pretrain(make_config(tmp_path / "plain", log_period=2))
    assert {k: v for k, v in curve(tmp_path / "plain").items()} == expected
    ours, plain = (final_checkpoint(path)["model"] for path in (resumed, tmp_path / "plain"))
    assert all(torch.equal(ours[key], plain[key]) for key in plain)


def test_config_commit_and_checkpoints_are_recorded(resumed, wandb_records, mlflow_client):
    digest = hashlib.sha256((resumed / "model_final.pth").read_bytes()).hexdigest()
    value = f"{resumed / 'model_final.pth'} sha256:{digest}"
    tracked, state = read_tracked(str(resumed)), git_state()

    run = mlflow_client.get_run(tracked["mlflow"].id)
    assert run.data.params["optimizer.lr"] == "2.0" and run.data.params["train.max_iter"] == "None"
    assert run.data.tags["checkpoints/model_final.pth"] == value
    assert run.data.tags["group"] == "g"
    assert run.data.tags["t"] == run.data.tags["50_"] == ""
    for place, facts in state.items():
        assert run.data.tags[f"git.{place}.commit"] == facts["commit"]
        assert run.data.tags[f"git.{place}.dirty"] == str(facts["dirty"])
    text = mlflow_client.download_artifacts(run.info.run_id, "config.yaml")
    assert Path(text).read_text() == (resumed / "config.yaml").read_text()
    names = [file.path for file in mlflow_client.list_artifacts(run.info.run_id)]
    assert "checkpoints" not in names

    _, records = wandb_records(resumed)[-1]
    runs = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    settings = values(runs[0].config.update)
    assert settings["optimizer"]["lr"] == 2.0 and settings["git"] == state
    assert (runs[0].project, runs[0].run_group, list(runs[0].tags)) == ("tiny", "g", ["t", "50%"])
    summary = {}
    for record in records:
        if record.WhichOneof("record_type") == "summary":
            summary |= values(record.summary.update)
    assert summary["checkpoints/model_final.pth"] == value


def test_a_config_that_an_outage_cut_short_is_completed(tmp_path, monkeypatch, mlflow_client):
    from mlflow import MlflowClient

    requests, log_batch = [], MlflowClient.log_batch

    def fails_second(self, run_id, *args, **kwargs):
        requests.append(kwargs.get("params"))
        if len(requests) == 2:
            raise ConnectionError("no route")
        return log_batch(self, run_id, *args, **kwargs)

    monkeypatch.setattr(MlflowClient, "log_batch", fails_second)
    config = {f"key{i}": i for i in range(250)}
    info = RunInfo(str(tmp_path), config=config, project="cut short", name="run")
    service = MlflowService(info, lambda *_: None)
    with pytest.raises(ConnectionError):
        service.open(last_try=False)
    service.open(last_try=False)
    run = mlflow_client.get_run(read_tracked(str(tmp_path))["mlflow"].id)
    assert run.data.params == {key: str(value) for key, value in config.items()}
    assert [len(params) for params in requests] == [100, 100, 100, 50]


def test_a_run_that_was_deleted_in_mlflow_is_replaced(tmp_path, monkeypatch, mlflow_client):
    monkeypatch.setenv("STOP_AT", "9")
    cfg = config(tmp_path)
    cfg.train.writers = ["json", "mlflow"]
    with pytest.raises(KeyboardInterrupt):
        do_pretrain(cfg)
    old = read_tracked(str(tmp_path))["mlflow"].id
    mlflow_client.delete_run(old)
    monkeypatch.setenv("STOP_AT", "-1")
    do_pretrain(cfg, resume=True)
    new = read_tracked(str(tmp_path))["mlflow"].id
    logged = mlflow_client.get_metric_history(new, "total_loss")
    assert new != old and {m.step: m.value for m in logged} == curve(tmp_path)


def test_the_final_model_is_uploaded_on_demand(tmp_path, mlflow_client):
    cfg = config(tmp_path, epochs=2, checkpointer={"period": 2})
    cfg.train.writers, cfg.train.tracking.upload_model = ["json", "mlflow"], True
    do_pretrain(cfg)
    run_id = read_tracked(str(tmp_path))["mlflow"].id
    (file,) = mlflow_client.list_artifacts(run_id, "checkpoints")
    assert file.path == "checkpoints/model_final.pth"
    assert file.file_size == os.path.getsize(tmp_path / "model_final.pth")


def test_a_service_that_is_added_on_resumption_receives_the_history(
    tmp_path, monkeypatch, mlflow_client
):
    monkeypatch.setenv("STOP_AT", "16")
    cfg = config(tmp_path)
    cfg.train.writers = ["json"]
    with pytest.raises(KeyboardInterrupt):
        do_pretrain(cfg)
    monkeypatch.setenv("STOP_AT", "-1")
    cfg = config(tmp_path)
    cfg.train.writers = ["json", "mlflow"]
    do_pretrain(cfg, resume=True)
    run_id = read_tracked(str(tmp_path))["mlflow"].id
    logged = mlflow_client.get_metric_history(run_id, "total_loss")
    assert {m.step: m.value for m in logged} == curve(tmp_path) and len(logged) == 10


def test_a_new_run_in_an_emptied_folder_is_a_new_run(tmp_path):
    cfg = config(tmp_path, epochs=2)
    cfg.train.writers = ["json", "mlflow"]
    do_pretrain(cfg)
    old = read_tracked(str(tmp_path))
    for path in [tmp_path / "metrics.json", *tmp_path.glob("model_*.pth")]:
        path.unlink()
    do_pretrain(cfg)
    assert read_tracked(str(tmp_path))["mlflow"].id != old["mlflow"].id


def test_a_service_that_cannot_be_reached_is_one_warning(tmp_path, monkeypatch, mlflow_client):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    cfg = config(tmp_path)
    cfg.train.writers, cfg.train.tracking.seconds = ["json", "mlflow"], 10
    do_pretrain(cfg)
    assert len(curve(tmp_path)) == 10
    log = (tmp_path / "log.txt").read_text()
    assert log.count("MLflow cannot be reached: MlflowException: API request to") == 1
    assert "MLflow lacks 10 rows of metrics.json, which --resume sends: " in log

    monkeypatch.undo()  # the server is back
    do_pretrain(cfg, resume=True)
    run = mlflow_client.get_run(read_tracked(str(tmp_path))["mlflow"].id)
    logged = mlflow_client.get_metric_history(run.info.run_id, "total_loss")
    assert {m.step: m.value for m in logged} == curve(tmp_path) and len(logged) == 10
    assert run.info.status == "FINISHED"


def test_without_a_connection_wandb_keeps_the_run_on_the_disk(tmp_path, monkeypatch, wandb_records):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    cfg = config(tmp_path)
    cfg.train.writers, cfg.train.tracking.seconds = ["json", "wandb"], 4
    do_pretrain(cfg)
    ((_, records),) = wandb_records(tmp_path)
    assert {i: row["total_loss"] for i, row in history(records).items()} == curve(tmp_path)
    log = (tmp_path / "log.txt").read_text()
    assert log.count("Weights & Biases cannot be reached: CommError") == 1
    assert "Weights & Biases: offline, run " in log


def test_wandb_gets_the_rows_of_an_attempt_that_was_killed_before_it_was_connected(
    tmp_path, monkeypatch, wandb_records
):
    cfg = config(tmp_path)
    cfg.train.writers = ["json"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setenv("STOP_AT", "16")
        do_pretrain(cfg)
    (tmp_path / "wandb_run.json").write_text('{"id": "abc", "url": null}\n')
    assert read_tracked(str(tmp_path))["wandb"].id == "abc"
    cfg.train.writers = ["json", "wandb"]
    do_pretrain(cfg, resume=True)
    ((_, records),) = wandb_records(tmp_path)
    assert {i: row["total_loss"] for i, row in history(records).items()} == curve(tmp_path)


def test_a_service_whose_disk_fills_does_not_stop_the_run(tmp_path, monkeypatch, mlflow_client):
    store = Path(os.environ["MLFLOW_TRACKING_URI"].removeprefix("file://"))
    mlflow_client.get_experiment_by_name("tiny")
    cfg = config(tmp_path)
    cfg.train.writers = ["json", "mlflow"]

    def lose_the_disk(trainer):
        if trainer.iter == 9:
            store.rename(tmp_path / "lost")  # at once: MLflow may be writing
            store.write_text("")

    monkeypatch.setattr(StopAt, "after_step", lambda self: lose_the_disk(self.trainer))
    do_pretrain(cfg)
    assert len(curve(tmp_path)) == 10
    assert (tmp_path / "log.txt").read_text().count("MLflow cannot be reached") == 1


def test_a_missing_login_is_one_line_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    cfg = config(tmp_path / "run")
    with pytest.raises(UserError, match="^Weights & Biases: No API key configured.*WANDB_MODE"):
        do_pretrain(cfg)
    assert not list((tmp_path / "run").glob("model_*"))


def test_a_store_that_the_package_cannot_use_is_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE")
    cfg = config(tmp_path)
    cfg.train.writers = ["json", "mlflow"]
    with pytest.raises(UserError, match="^MLflow cannot use file://.*Set MLFLOW_TRACKING_URI"):
        do_pretrain(cfg)
