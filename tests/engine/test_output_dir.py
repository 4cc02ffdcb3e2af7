import logging
import os
import random
import shutil

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig
from detectron2.engine import HookBase
from tiny_run import make_config

from region_pretrain.config import complete_train, load_config
from region_pretrain.engine import output_dir
from region_pretrain.engine.output_dir import holds_run, logging_kept, save_config
from region_pretrain.engine.run import start_run
from region_pretrain.errors import UserError
from region_pretrain.evaluation.knn_probe import KNNProbeHook


def begin(folder, resume=False, **train):
    cfg = complete_train(make_config(folder, **train))
    with start_run(cfg, resume):
        save_config(cfg)  # as a run does when its checkpoint has been read
        return cfg


def make_progress(folder):
    (folder / "metrics.json").write_text('{"iteration": 0}\n')


def test_config_is_saved_and_loads_as_it_was(tmp_path):
    cfg = begin(tmp_path)
    assert LazyConfig.load(str(tmp_path / "config.yaml")).train == cfg.train
    assert (tmp_path / "log.txt").stat().st_size > 0


def test_a_folder_with_a_run_is_not_overwritten(tmp_path):
    begin(tmp_path)
    begin(tmp_path)  # nothing has happened yet, so nothing can be lost
    assert not holds_run(str(tmp_path))
    make_progress(tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    with pytest.raises(UserError, match="already contains a run.*--resume"):
        begin(tmp_path, seed=5)
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_a_run_that_ended_in_its_first_step_holds_nothing(tmp_path):
    begin(tmp_path)
    (tmp_path / "metrics.json").touch()
    assert not holds_run(str(tmp_path))
    begin(tmp_path, seed=5)
    assert LazyConfig.load(str(tmp_path / "config.yaml")).train.seed == 5


def test_a_run_of_a_yacs_config_resumes_with_keys_of_its_own(tmp_path):
    zoo = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"

    def begin(resume, *more):
        with start_run(load_config(zoo, [*more, f"train.output_dir={tmp_path}"]), resume):
            pass

    begin(False)
    make_progress(tmp_path)
    begin(True, "DATALOADER.NUM_WORKERS=8", "TEST.EVAL_PERIOD=1000", "MODEL.DEVICE=cpu")
    for change, message in (
        ("SOLVER.MAX_ITER=180000", "train.max_iter: 90000 -> 180000.*train.allow_new_length=True"),
        ("SOLVER.BASE_LR=0.5", "optimizer.lr: 0.02 -> 0.5"),
        ("MODEL.RPN.NMS_THRESH=0.5", "model.cfg.MODEL.RPN.NMS_THRESH: 0.7 -> 0.5"),
    ):
        with pytest.raises(UserError, match=message):
            begin(True, change)
    begin(True, "SOLVER.MAX_ITER=180000", "train.allow_new_length=True")


def test_a_run_of_an_earlier_version_resumes(tmp_path):
    """Its config lacks keys that have been added since, which stand for their defaults."""
    begin(tmp_path)
    make_progress(tmp_path)
    saved = LazyConfig.load(str(tmp_path / "config.yaml"))
    for key in ("refresh_regions", "max_unreadable", "freeze", "pictures"):
        del saved.train[key]
    LazyConfig.save(saved, str(tmp_path / "config.yaml"))
    begin(tmp_path, resume=True)
    with pytest.raises(UserError, match=r"train.freeze: \[\] -> \['backbone'\]"):
        begin(tmp_path, resume=True, freeze=["backbone"])


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"log_period": 50},
        {"checkpointer": {"period": 1, "max_to_keep": 9}, "checkpoint_minutes": 3},
        {"eval_period": 7},
        {"device": None},
        {"compile": True},
        {"max_unreadable": 0.5},
    ],
)
def test_resume_accepts_the_same_config_and_harmless_changes(tmp_path, train):
    begin(tmp_path)
    make_progress(tmp_path)
    cfg = begin(tmp_path, resume=True, **train)
    assert LazyConfig.load(str(tmp_path / "config.yaml")).train == cfg.train


@pytest.mark.parametrize(("name", "before", "after"), [("num_workers", 2, 8), ("pin_memory", 1, 0)])
def test_resume_accepts_what_does_not_change_batches(tmp_path, name, before, after):
    cfg = make_config(tmp_path)
    cfg.dataloader.train[name] = before
    with start_run(complete_train(cfg), False):
        pass
    make_progress(tmp_path)
    cfg.dataloader.train[name] = after
    with start_run(cfg, True):
        pass


def test_a_probe_may_be_added_to_a_run_and_removed(tmp_path):
    """It only observes; a hook of another kind may change what is computed."""
    begin(tmp_path, hooks=[L(HookBase)()])
    make_progress(tmp_path)
    probe = L(KNNProbeHook)(period=500, train_names="shapes_train")
    for hooks in ([L(HookBase)(), probe], [probe, L(HookBase)()], [L(HookBase)()]):
        begin(tmp_path, resume=True, hooks=hooks)
        saved = LazyConfig.load(str(tmp_path / "config.yaml")).train.hooks
        names = [str(hook._target_).rpartition(".")[2] for hook in saved]
        assert names == [hook._target_.__name__ for hook in hooks]
    with pytest.raises(UserError, match=r"train.hooks: \[{'_target_': .*HookBase'}\] -> \[\]\."):
        begin(tmp_path, resume=True, hooks=[probe])


def test_resume_refuses_another_config_and_lists_the_changes(tmp_path):
    begin(tmp_path)
    make_progress(tmp_path)
    cfg = complete_train(make_config(tmp_path, seed=3, epochs=8))
    cfg.model.noise = 0.2
    cfg.optimizer.momentum = 0.5
    with pytest.raises(UserError) as error, start_run(cfg, True):
        pass
    for part in (
        "model.noise: 0.1 -> 0.2",
        "optimizer.momentum: (absent) -> 0.5",
        "train.seed: 0 -> 3",
        "train.epochs: 4 -> 8",
    ):
        assert part in str(error.value)
    assert "log_period" not in str(error.value)


def test_a_drawn_seed_is_saved_and_kept_on_resume(tmp_path):
    cfg = begin(tmp_path, seed=None)
    assert isinstance(cfg.train.seed, int)
    make_progress(tmp_path)
    assert begin(tmp_path, resume=True, seed=None).train.seed == cfg.train.seed
    other = begin(tmp_path / "other", seed=None)
    assert other.train.seed != cfg.train.seed


def test_all_generators_start_from_the_seed(tmp_path):
    draws = []
    for _ in range(2):
        begin(tmp_path, seed=3)
        draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_an_unwritable_folder_is_a_user_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to train.output_dir=.*file/run:"):
        begin(tmp_path / "file" / "run")


def test_absent_weights_are_named_before_the_folder_is_made(tmp_path):
    with pytest.raises(UserError, match="train.init_checkpoint: there is no absent.pth: name the"):
        begin(tmp_path / "run", init_checkpoint="absent.pth")
    assert not (tmp_path / "run").exists()
    begin(tmp_path)
    make_progress(tmp_path)
    cfg = complete_train(make_config(tmp_path, init_checkpoint="absent.pth"))
    with pytest.raises(UserError, match="cannot resume with a config that differs"):
        with start_run(cfg, True):  # the weights are those of its checkpoint
            pass


def test_a_second_run_in_the_process_logs_to_its_own_folder(tmp_path):
    begin(tmp_path / "a")
    begin(tmp_path / "b")
    logging.getLogger("region_pretrain.test").info("only in b")
    assert "only in b" in (tmp_path / "b" / "log.txt").read_text()
    assert "only in b" not in (tmp_path / "a" / "log.txt").read_text()


def test_a_folder_that_was_deleted_has_a_log_again(tmp_path):
    for text in ("first", "second"):
        begin(tmp_path / "a")
        logging.getLogger("region_pretrain.test").info("the %s run", text)
        assert f"the {text} run" in (tmp_path / "a/log.txt").read_text()
        shutil.rmtree(tmp_path / "a")
    opened = {os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")
              if os.path.islink(f"/proc/self/fd/{fd}")}  # fmt: skip
    assert sum(f"{tmp_path}/a/log.txt" in path for path in opened) == 1


def test_runs_within_and_after_a_context_leave_no_closed_log(tmp_path, capsys):
    begin(tmp_path / "a")
    with logging_kept(lambda record: False):
        begin(tmp_path / "b")
        logging.getLogger("region_pretrain.test").info("inside")
    logging.getLogger("region_pretrain.test").info("outside")
    begin(tmp_path / "c")
    logging.getLogger("region_pretrain.test").info("later")
    found = {name: (tmp_path / name / "log.txt").read_text() for name in "abc"}
    words = ("inside", "outside", "later")
    assert [[w for w in words if w in found[name]] for name in "abc"] == [
        ["outside"], ["inside"], ["later"]
    ]  # fmt: skip
    assert "Logging error" not in capsys.readouterr().err


def test_the_traceback_of_the_trainer_stays_off_the_console_under_any_name():
    """Detectron2's formatter of another handler abbreviates the name in the record itself."""
    for name, kept in (
        ("detectron2.engine.train_loop", False),
        ("d2.engine.train_loop", False),
        ("region_pretrain.engine.hooks", True),
    ):
        error = (OSError, OSError("full"), None)
        record = logging.LogRecord(name, logging.ERROR, "", 0, "Exception", (), error)
        assert output_dir._is_not_traceback(record) is kept
