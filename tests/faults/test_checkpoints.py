"""Damaged files of a run: it continues from intact ones to the same result, or says one line."""

import logging
import pickle
import shutil
import zipfile

import pytest
import torch
from damage import changes, damage, fuzz, outcome
from detectron2.config import LazyCall as L
from equality import equal
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import StopAt, TinyMethod, final_checkpoint, make_config

from region_pretrain.engine.checkpoint import RunCheckpointer
from region_pretrain.engine.checkpoint_file import DamagedCheckpoint, read_run_checkpoint
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError

RUN = {"max_iter": 20, "total_batch_size": 8, "world_size": 1}


def make(folder) -> RunCheckpointer:
    model = TinyMethod(norm="BN")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return RunCheckpointer(model, str(folder), run=RUN, optimizer=optimizer)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints after iterations 1 and 3, and the weights in each by the next iteration."""
    checkpointer, weights = make(tmp_path), {}
    for iteration in (1, 3):
        with torch.no_grad():
            for p in checkpointer.model.parameters():
                p.normal_()
        checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        state = checkpointer.model.state_dict()
        weights[iteration + 1] = {k: v.clone() for k, v in state.items()}
    return tmp_path, weights


def central_directory(data: bytes) -> int:
    return data.index(b"PK\x01\x02")


def resumed_from(folder) -> tuple[int, dict]:
    checkpointer = make(folder)
    return checkpointer.resume(), checkpointer.model.state_dict()


def test_every_byte_of_the_zip_directory(saved):
    """What is called intact is loaded, and contains what was saved."""
    folder, weights = saved
    newest = folder / "model_0000003.pth"
    data = newest.read_bytes()
    content = torch.load(newest, weights_only=True)
    damaged, start = 0, central_directory(data)
    for at in range(start, len(data), 3):
        newest.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        try:
            assert equal(read_run_checkpoint(str(newest)), content)
        except DamagedCheckpoint as error:
            assert "\n" not in str(error)
            damaged += 1
    assert damaged > (len(data) - start) // 3 / 3


def test_fuzzed_checkpoints(saved):
    folder, weights = saved
    newest = folder / "model_0000003.pth"
    data = newest.read_bytes()

    @fuzz(250)
    @given(change=changes())
    def run(change):
        newest.write_bytes(change(data))
        found = outcome(lambda: resumed_from(folder))
        start, state = found  # never refused: the one before is intact
        assert equal(dict(state), weights[start])

    run()


def encrypt(path):
    data = bytearray(path.read_bytes())
    at = central_directory(bytes(data))
    data[at + 8] |= 1
    path.write_bytes(data)


def folder_flag(path):
    """PyTorch would leave this tensor uninitialised."""
    data = bytearray(path.read_bytes())
    name = b"archive/data/0"
    data[data.rindex(name) - 8] |= 0x10
    path.write_bytes(data)


def compress_method(path):
    """The directory says deflate; the bytes are stored."""
    data = bytearray(path.read_bytes())
    data[central_directory(bytes(data)) + 10] = 8
    path.write_bytes(data)


def foreign_pickle(path):
    path.write_bytes(pickle.dumps({"model": print}))


def without_our_keys(path):
    torch.save({"state_dict": {"x": torch.ones(3)}}, path)


def a_list(path):
    torch.save([torch.ones(3)], path)


def wrong_types(path):
    data = torch.load(path, weights_only=True)
    torch.save({**data, "run": [1, 2], "iteration": "3"}, path)


def with_code(path):
    torch.save({"model": print}, path)


def text(path):
    path.write_text("epoch 3, loss 0.1\n")


def empty_archive(path):
    zipfile.ZipFile(path, "w").close()


DAMAGES = [
    encrypt,
    folder_flag,
    compress_method,
    foreign_pickle,
    without_our_keys,
    a_list,
    wrong_types,
]
DAMAGES += [wrong_types, with_code, text, empty_archive]


@pytest.mark.parametrize("change", DAMAGES, ids=lambda f: f.__name__)
def test_the_checkpoint_before_is_used_with_a_warning(saved, caplog, change):
    folder, weights = saved
    change(folder / "model_0000003.pth")
    with caplog.at_level(logging.WARNING):
        start, state = resumed_from(folder)
    assert start == 2 and equal(dict(state), weights[2])
    (warning,) = [r.message for r in caplog.records if "trying the checkpoint before" in r.message]
    assert "model_0000003.pth is" in warning and "\n" not in warning
    damage(folder / "model_0000001.pth", lambda data: data[:100])
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        resumed_from(folder)


@pytest.mark.parametrize(
    "content",
    [b"\xff\xfe\x00\x80", b"", b"model_0000009.pth", b"../x\x00.pth", b"log.txt", b"a\nb"],
)
def test_a_damaged_last_checkpoint_file_is_not_needed(saved, content):
    folder, weights = saved
    (folder / "last_checkpoint").write_bytes(content)
    assert make(folder).last_good() == ""
    start, state = resumed_from(folder)
    assert start == 4 and equal(dict(state), weights[4])


def test_last_checkpoint_may_be_a_folder(saved):
    folder, weights = saved
    (folder / "last_checkpoint").unlink()
    (folder / "last_checkpoint").mkdir()
    assert resumed_from(folder)[0] == 4
    with pytest.raises(UserError, match="cannot write .*last good checkpoint: none"):
        make(folder).save("model_0000005", iteration=5)


def test_state_of_another_optimizer_is_one_line(saved):
    folder, _ = saved
    checkpointer = make(folder)
    first = next(checkpointer.model.parameters())
    checkpointer.checkpointables["optimizer"] = torch.optim.SGD([first], lr=0.1)
    error = outcome(checkpointer.resume)
    assert "model_0000003.pth belongs to another run, its optimizer" in str(error)


FILES = ["config.yaml", "metrics.json", "last_checkpoint", "progress.json"]
FILES += ["model_0000005.pth", "model_0000011.pth"]


def test_fuzzed_runs_end_with_the_same_result(tmp_path, monkeypatch):
    stopped, again = tmp_path / "stopped", tmp_path / "again"
    cfg = make_config(again, hooks=[L(StopAt)()])
    do_pretrain(cfg)
    expected = final_checkpoint(again)
    again.rename(tmp_path / "whole")
    monkeypatch.setenv("STOP_AT", "13")
    with pytest.raises(KeyboardInterrupt):
        do_pretrain(make_config(again, hooks=[L(StopAt)()]))
    monkeypatch.delenv("STOP_AT")
    again.rename(stopped)
    assert {*FILES} <= {path.name for path in stopped.iterdir()}
    finished = []

    @fuzz(60)
    @given(name=st.sampled_from(FILES), change=changes())
    def run(name, change):
        shutil.rmtree(again, ignore_errors=True)
        shutil.copytree(stopped, again)
        damage(again / name, change)
        found = outcome(lambda: do_pretrain(make_config(again, hooks=[L(StopAt)()]), resume=True))
        if isinstance(found, UserError):
            assert name == "config.yaml", found
        else:
            finished.append(name)
            assert equal(final_checkpoint(again), expected)

    run()
    assert len(finished) > 30 and len(set(finished)) >= 5
