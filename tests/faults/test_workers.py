"""Workers of a loader that die, and errors in workers that live."""

import pytest
from detectron2.config import LazyCall as L
from tiny_run import make_detection_config

from region_pretrain.engine.finetune import do_train
from region_pretrain.errors import ProcessKilled, UserError


def test_a_final_evaluation_that_lost_a_worker_is_repeated(tmp_path, monkeypatch):
    def lose_a_worker(*args):
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    cfg = make_detection_config(tmp_path, max_iter=3)
    with monkeypatch.context() as patch, pytest.raises(ProcessKilled, match="final evaluation fa"):
        patch.setattr("region_pretrain.engine.finetune.do_test", lose_a_worker)
        do_train(cfg)
    assert not (tmp_path / "results.json").exists()
    assert do_train(cfg, resume=True)["bbox"]["AP"] >= 0


class Faulty:
    def __call__(self, record):
        raise RuntimeError("the size of tensor a must match")


@pytest.mark.parametrize(
    "text",
    [
        "Caught RuntimeError in DataLoader worker process 0. Original Traceback: the size of",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_an_error_in_a_worker_is_no_killed_process(tmp_path, monkeypatch, text):
    """Another attempt would meet it again, so a job must not be requeued."""
    cfg = make_detection_config(tmp_path / "a", max_iter=3)
    cfg.dataloader.train.update(mapper=L(Faulty)(), num_workers=1)
    with pytest.raises(RuntimeError, match="(?s)in DataLoader worker.*the size of tensor a"):
        do_train(cfg)

    def fail(*args):
        raise RuntimeError(text)

    monkeypatch.setattr("region_pretrain.engine.finetune.do_test", fail)
    with pytest.raises(UserError, match="the final evaluation failed") as caught:
        do_train(make_detection_config(tmp_path / "b", max_iter=3))
    assert caught.value.exit_code == 2
