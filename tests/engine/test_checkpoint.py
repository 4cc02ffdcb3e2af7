import errno
import logging
import os
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from tiny_run import TinyMethod
from torch import nn

from region_pretrain import files
from region_pretrain.engine import checkpoint
from region_pretrain.engine.checkpoint import RunCheckpointer, split_state
from region_pretrain.engine.checkpoint_file import (
    DamagedCheckpoint,
    check_free_space,
    read_run_checkpoint,
)
from region_pretrain.errors import UserError

RUN = {"max_iter": 20, "total_batch_size": 8, "world_size": 1}


def make(folder, seed=0, width=5, allow=False, **run):
    torch.manual_seed(seed)
    model = TinyMethod(norm="BN", width=width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return RunCheckpointer(
        model,
        str(folder),
        run={**RUN, **run},
        allow_world_size_change=allow,
        optimizer=optimizer,
    )


def step(checkpointer):
    optimizer = checkpointer.checkpointables["optimizer"]
    for p in checkpointer.model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


class Detector(nn.Module):
    """A stock detector: the modules under their own names, and one that pre-training lacks."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh())
        self.proposal_generator = nn.Linear(5, 1)


def test_the_detector_is_stored_separately_and_loads_with_weights_only(tmp_path):
    checkpointer = make(tmp_path)
    step(checkpointer)
    checkpointer.save("model_0000004", iteration=4)
    data = torch.load(tmp_path / "model_0000004.pth", weights_only=True)
    assert data.keys() == {
        *("model", "pretraining", "optimizer", "hooks", "rng", "run", "iteration", "detector"),
    }
    assert all(name.startswith("backbone.") for name in data["model"])
    assert len(data["model"]) == 7  # a linear layer's 2, and batch norm's 5 with its counter
    assert {name.split(".")[0] for name in data["pretraining"]} == {"target", "predictor", "queue"}
    assert (data["iteration"], data["run"], len(data["rng"])) == (4, RUN, 1)
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"


def test_stock_checkpointer_fills_a_detector_and_names_only_what_is_new(tmp_path, caplog):
    checkpointer = make(tmp_path)
    step(checkpointer)
    checkpointer.save("model_final", iteration=19)
    detector = Detector()
    with caplog.at_level(logging.WARNING):
        DetectionCheckpointer(detector).load(str(tmp_path / "model_final.pth"))
    for name, value in checkpointer.model.backbone.state_dict().items():
        assert torch.equal(detector.backbone.state_dict()[name], value), name
    assert "proposal_generator" in caplog.text
    assert "backbone" not in caplog.text and "predictor" not in caplog.text


def test_a_model_without_detector_modules_is_a_detector():
    detector, rest = split_state(Detector())
    assert detector.keys() == Detector().state_dict().keys() and rest == {}


def test_prefixes_end_at_a_module(tmp_path):
    model = TinyMethod()
    model.backbone_target = nn.Linear(1, 1)
    detector, rest = split_state(model)
    assert "backbone_target.weight" in rest and "backbone_target.weight" not in detector


def test_resume_restores_everything(tmp_path):
    saved = make(tmp_path, seed=0)
    step(saved)
    saved.save("model_0000004", iteration=4)
    expected_noise = torch.rand(4)
    resumed = make(tmp_path, seed=1)
    assert resumed.resume() == 5
    resumed.restore_random_state()
    assert torch.equal(torch.rand(4), expected_noise)
    for _ in range(2):  # the second step depends on the momentum buffers
        step(saved)
        step(resumed)
    for name, value in saved.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_float16_run_may_be_resumed_on_a_cpu_in_between(tmp_path, caplog):
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    on_gpu, on_cpu, again = make(tmp_path), make(tmp_path), make(tmp_path)
    on_gpu.checkpointables["scaler"] = again.checkpointables["scaler"] = scaler
    on_gpu.save("model_0000004", iteration=4)
    assert on_cpu.resume() == 5
    on_cpu.save("model_0000009", iteration=9)
    with caplog.at_level("WARNING"):
        assert again.resume() == 10
    assert "model_0000009.pth was written on a device without a loss scale" in caplog.text
    assert scaler.get_scale() == 8.0


def test_nothing_to_resume_starts_at_zero(tmp_path):
    assert make(tmp_path).resume() == 0
    assert make(tmp_path / "absent").resume() == 0


def truncate(path):
    with open(path, "r+b") as f:
        f.truncate(os.path.getsize(path) // 2)


def flip_byte(path):
    with open(path, "r+b") as f:
        f.seek(os.path.getsize(path) // 2)
        byte = f.read(1)[0]
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte ^ 0xFF]))


def empty(path):
    open(path, "w").close()


@pytest.mark.parametrize("damage", [truncate, flip_byte, empty, os.remove])
def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(tmp_path, caplog, damage):
    checkpointer = make(tmp_path)
    for iteration in (1, 3, 5):
        step(checkpointer)
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
    damage(tmp_path / "model_0000005.pth")
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path).resume() == 4
    assert "model_0000005.pth is" in caplog.text


def test_the_newest_intact_one_may_be_older_or_newer_than_that_of_a_finished_run(tmp_path):
    checkpointer = make(tmp_path)
    for iteration, name in ((1, "model_0000001"), (3, "model_final"), (5, None), (7, None)):
        step(checkpointer)  # a finished run, then extended
        checkpointer.save(name or f"model_{iteration:07d}", iteration=iteration)
    assert make(tmp_path).resume() == 8
    truncate(tmp_path / "model_0000007.pth")
    assert make(tmp_path).resume() == 6
    truncate(tmp_path / "model_0000005.pth")
    assert make(tmp_path).resume() == 4
    truncate(tmp_path / "model_final.pth")
    assert make(tmp_path).resume() == 2
    truncate(tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="none of the 4 checkpoints .* is readable"):
        make(tmp_path).resume()


def test_when_all_are_damaged_it_does_not_start_over_silently(tmp_path):
    checkpointer = make(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    truncate(tmp_path / "model_0000001.pth")
    with pytest.raises(UserError, match="none of the 1 checkpoints .* is readable"):
        make(tmp_path).resume()


def with_hook(checkpointer, state):
    """Give a checkpointer a trainer with one hook."""
    hook = type("Hook", (), {"state_dict": lambda self: state, "__qualname__": "mine.Hook"})()
    checkpointer.trainer = SimpleNamespace(_hooks=[hook])
    return checkpointer


def test_numpys_numbers_are_saved_as_others_read_them(tmp_path):
    """A schedule that computes with NumPy sets learning rates of its type."""
    state = {"best": np.float64(0.1), "seen": [(np.int64(3), np.bool_(True))], "x": np.arange(3)}
    checkpointer = with_hook(make(tmp_path), state)
    checkpointer.checkpointables["optimizer"].param_groups[0]["lr"] = np.float64(0.1)
    checkpointer.save("model_0000001", iteration=1)
    data = torch.load(tmp_path / "model_0000001.pth", weights_only=True)  # as Detectron2 does
    assert type(data["optimizer"]["param_groups"][0]["lr"]) is float
    saved = data["hooks"]["mine.Hook"]
    assert (saved["best"], saved["seen"]) == (0.1, [(3, True)])
    assert type(saved["best"]) is float and torch.equal(saved["x"], torch.arange(3))
    assert type(state["best"]) is np.float64 and isinstance(state["x"], np.ndarray)
    checkpointer = make(tmp_path)
    assert checkpointer.resume() == 2
    assert checkpointer.checkpointables["optimizer"].param_groups[0]["lr"] == 0.1


@pytest.mark.parametrize("value", [Path("x"), Decimal(1), lambda: 0, np.array(["a", "b"])])
def test_a_hook_whose_state_cannot_be_read_back_is_named_before_it_is_saved(tmp_path, value):
    checkpointer = with_hook(make(tmp_path), {"value": [value]})
    with pytest.raises(UserError, match="state_dict of the hook mine.Hook cannot be saved and re"):
        checkpointer.save("model_0000001", iteration=1)
    assert not list(tmp_path.iterdir())


def test_bit_flips_are_seen(tmp_path):
    make(tmp_path).save("m", iteration=1)
    path = tmp_path / "m.pth"
    assert read_run_checkpoint(str(path))["iteration"] == 1
    flip_byte(path)
    with pytest.raises(DamagedCheckpoint, match=r"m\.pth is damaged"):
        read_run_checkpoint(str(path))


@pytest.mark.parametrize("key", ["max_iter", "total_batch_size"])
def test_another_schedule_is_refused(tmp_path, key):
    make(tmp_path).save("model_0000001", iteration=1)
    with pytest.raises(UserError, match=f"{key}={RUN[key]}, now it is 99"):
        make(tmp_path, **{key: 99}).resume()


def test_another_number_of_processes_is_refused_unless_allowed(tmp_path, caplog):
    make(tmp_path).save("model_0000001", iteration=1)
    with pytest.raises(UserError, match="start 1 processes, or set train.allow_world_size_change"):
        make(tmp_path, world_size=2).resume()
    with caplog.at_level(logging.WARNING):
        assert make(tmp_path, allow=True, world_size=2).resume() == 2
    assert "written by 1 processes, now there are 2" in caplog.text


def test_another_model_is_refused(tmp_path):
    make(tmp_path).save("model_0000001", iteration=1)
    with pytest.raises(UserError, match="belongs to another model.*backbone.0.weight"):
        make(tmp_path, width=7).resume()


def test_old_files_go_but_every_kth_stays(tmp_path):
    checkpointer = make(tmp_path)
    for iteration in range(9):
        (tmp_path / f"model_{iteration:07d}.pth").touch()
    for name in ("model_final.pth", "model_best.pth"):
        (tmp_path / name).touch()
    checkpointer.remove_old(max_to_keep=2, keep_every=3)
    left = sorted(p.name for p in tmp_path.iterdir())
    # iterations 3, 6 and 9 are done after the 0-based 2, 5 and 8
    numbers = [2, 5, 7, 8]
    assert left == [f"model_{n:07d}.pth" for n in numbers] + ["model_best.pth", "model_final.pth"]
    checkpointer.remove_old(max_to_keep=0, keep_every=0)
    assert len(list(tmp_path.iterdir())) == 6


def test_the_checkpoint_just_saved_stays_among_newer_damaged_ones(tmp_path):
    """The run has continued from an earlier checkpoint than these."""
    checkpointer = make(tmp_path)
    for iteration in (7, 8):
        (tmp_path / f"model_{iteration:07d}.pth").touch()
    for iteration in (3, 5):
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        checkpointer.remove_old(max_to_keep=2, keep_every=0)
        assert checkpointer.last_good() == str(tmp_path / f"model_{iteration:07d}.pth")
    assert not (tmp_path / "model_0000003.pth").exists()
    assert make(tmp_path).resume() == 6


class FullDisk:
    """A file on a disk with room for a number of bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self.file.write(data)


def test_disk_full_names_the_last_good_checkpoint_and_cleans_up(tmp_path, monkeypatch):
    checkpointer = make(tmp_path)
    checkpointer.save("model_0000001", iteration=1)
    monkeypatch.setattr(
        files, "open", lambda *args: FullDisk(open(*args), room=3000), raising=False
    )
    with pytest.raises(UserError) as error:
        checkpointer.save("model_0000003", iteration=3)
    assert "no space left for" in str(error.value)
    assert f"last good checkpoint: {tmp_path}/model_0000001.pth" in str(error.value)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]
    assert make(tmp_path).resume() == 2


def test_too_little_space_is_found_before_the_start(tmp_path, monkeypatch):
    model = nn.Linear(1024, 1024, bias=False)  # 4 MiB, and one buffer of 4 MiB: a file has 8
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    adam = torch.optim.AdamW(model.parameters(), lr=0.1)

    def free(mib):
        usage = SimpleNamespace(free=mib * 2**20)
        monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage)

    free(16)
    check_free_space(str(tmp_path), model, sgd)
    with pytest.raises(UserError, match="16 MiB free, but two checkpoints of 12 MiB"):
        check_free_space(str(tmp_path), model, adam)
    free(15)
    with pytest.raises(UserError, match="15 MiB free, but two checkpoints of 8 MiB"):
        check_free_space(str(tmp_path), model, sgd)
    check_free_space(str(tmp_path), model, sgd, has_one=True)
    free(7)
    with pytest.raises(UserError, match="7 MiB free, but another checkpoint of 8 MiB"):
        check_free_space(str(tmp_path), model, sgd, has_one=True)


def test_a_resume_removes_what_killed_writers_left(tmp_path):
    make(tmp_path).save("model_0000001", iteration=1)
    (tmp_path / "model_0000003.pth.part-host-77").write_bytes(b"half")
    assert make(tmp_path).resume() == 2
    assert not list(tmp_path.glob("*.part*"))


def test_names_sort():
    names = [checkpoint.checkpoint_name(i) for i in (4, 10, 123_456, 9_999_999)]
    assert names[0] == "model_0000004" and names == sorted(names)
