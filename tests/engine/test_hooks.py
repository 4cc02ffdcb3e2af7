import logging
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage
from torch import nn

from region_pretrain.engine import hooks
from region_pretrain.engine.checkpoint import RunCheckpointer
from region_pretrain.engine.hooks import CheckpointHook, CollapseWarning
from region_pretrain.errors import Stopped


class Files:
    """Stands in for a checkpointer and records its calls."""

    def __init__(self):
        self.saved, self.removed, self.restored = [], [], 0

    def save(self, name, iteration):
        self.saved.append((name, iteration))

    def remove_old(self, max_to_keep, keep_every):
        self.removed.append((max_to_keep, keep_every))

    def restore_random_state(self):
        self.restored += 1


def run(hook, iterations, before_step=lambda t: None):
    checked = []
    trainer = SimpleNamespace(iter=0, max_iter=iterations)
    trainer.check_finite = lambda: checked.append(trainer.iter)
    trainer.check_weights = lambda: None
    trainer.is_log_step = lambda: (trainer.iter + 1) % 2 == 0
    hook.trainer = trainer
    hook.before_train()
    for trainer.iter in range(iterations):
        before_step(trainer.iter)
        hook.after_step()
    return checked


def test_saves_by_iterations_and_at_the_end_after_a_check_for_nan():
    files = Files()
    checked = run(CheckpointHook(files, period=4, max_to_keep=2, keep_every=6), 10)
    assert files.saved == [
        ("model_0000003", 3),
        ("model_0000005", 5),
        ("model_0000007", 7),
        ("model_final", 9),
    ]
    assert checked == [3, 5, 7, 9]
    assert files.removed == [(2, 6)] * 3 + [(1, 6)]
    assert files.restored == 1


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"max_to_keep": 3}, ["0000007", "final"]),
        ({"max_to_keep": 3, "keep_every": 4}, ["0000003", "0000007", "final"]),
        ({"max_to_keep": None}, ["0000001", "0000003", "0000005", "0000007", "final"]),
    ],
)
def test_a_finished_run_keeps_one_checkpoint_before_the_final_one(tmp_path, settings, kept):
    files = RunCheckpointer(nn.Linear(2, 2), str(tmp_path), run={"max_iter": 10})
    run(CheckpointHook(files, period=2, **settings), 10)
    assert sorted(path.name for path in tmp_path.glob("*.pth")) == [f"model_{n}.pth" for n in kept]
    # It stands in for a damaged final one.
    (tmp_path / "model_final.pth").write_bytes(b"")
    again = RunCheckpointer(nn.Linear(2, 2), str(tmp_path), run={"max_iter": 10})
    assert again.resume() == 8


def test_a_stopped_run_keeps_all_that_it_may(tmp_path):
    files = RunCheckpointer(nn.Linear(2, 2), str(tmp_path), run={"max_iter": 10})
    steps = iter(range(10))
    hook = CheckpointHook(files, period=2, max_to_keep=3, stop=lambda: next(steps) == 8)
    with pytest.raises(Stopped):
        run(hook, 10)
    assert [i for i, _ in files.numbered()] == [5, 7, 8]


def test_saves_by_the_clock_at_log_steps(monkeypatch):
    now = 0.0
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now)

    def tick(t):
        nonlocal now
        now = 25.0 * t  # seconds

    files = Files()
    run(CheckpointHook(files, minutes=1), 9, before_step=tick)
    # a minute has passed at t=3 (75 s) and, counted from there, at t=6: looked at at t=7
    assert [iteration for _, iteration in files.saved] == [3, 7, 8]


def test_a_nan_is_never_saved():
    files = Files()
    hook = CheckpointHook(files, period=1)
    hook.trainer = SimpleNamespace(iter=0, max_iter=5)

    def fail():
        raise FloatingPointError

    hook.trainer.check_finite = fail
    with pytest.raises(FloatingPointError):
        hook.after_step()
    assert files.saved == []


def collapse(values, threshold=0.1, patience=3, name="online/embedding_std"):
    hook = CollapseWarning(threshold, patience)
    with EventStorage(0) as storage:
        hook.trainer = SimpleNamespace(storage=storage, is_log_step=lambda: True)
        for t, value in enumerate(values):
            hook.trainer.iter = storage.iter = t
            if value is not None:
                storage.put_scalar(name, value)
            hook.after_step()


def test_collapse_is_reported_after_a_while_and_again(caplog):
    with caplog.at_level(logging.WARNING):
        collapse([0.9, 0.05, 0.04, 0.03, 0.02, 0.02, 0.01])
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 2
    assert messages[0].startswith("online/embedding_std is 0.030 ")
    assert "for 3 log periods" in messages[0] and "for 6 log periods" in messages[1]
    assert "optimizer.lr" in messages[0]


@pytest.mark.parametrize(
    "values, name",
    [
        ([0.05, 0.05, 0.5, 0.05, 0.05], "embedding_std"),  # it recovers in between
        ([0.05] * 9, "weight_std"),  # another quantity
        ([0.05, None, None, None, None], "embedding_std"),  # reported once, not again and again
    ],
)
def test_no_warning_without_collapse(caplog, values, name):
    with caplog.at_level(logging.WARNING):
        collapse(values, name=name)
    assert not caplog.records
