import json
import os
import signal
import threading

import pytest
import torch
from detectron2.config import LazyCall as L
from tiny_run import CLOCK, TellAt, make_config, make_detection_config, train_in_process
from torch.utils.data import DataLoader, Dataset

from region_pretrain.data.loader import PretrainLoader
from region_pretrain.data.workers import init_worker
from region_pretrain.engine.detection_data import DetectionTrainData
from region_pretrain.engine.finetune import do_train
from region_pretrain.engine.preemption import StopRequest
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import launch
from region_pretrain.errors import STOPPED, Stopped


def metrics(folder):
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def checkpoints(folder):
    return sorted(path.name for path in folder.glob("model_*.pth"))


def same_weights(a, b):
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (a, b))
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize(
    ("run", "config"), [(do_pretrain, make_config), (do_train, make_detection_config)]
)
def test_a_signalled_run_saves_and_continues_exactly(tmp_path, monkeypatch, run, config):
    hooks = [L(TellAt)()]
    run(config(tmp_path / "whole", hooks=hooks))
    monkeypatch.setenv("TELL_AT", "8")
    with pytest.raises(Stopped) as stopped:
        run(config(tmp_path / "stopped", hooks=hooks))
    assert stopped.value.code == STOPPED == 75
    assert checkpoints(tmp_path / "stopped")[-1] == "model_0000008.pth"
    assert signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL
    run(config(tmp_path / "stopped", hooks=hooks), resume=True)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    assert same_weights(tmp_path / "stopped", tmp_path / "whole")


def test_a_signal_in_the_last_step_lets_the_run_finish(tmp_path, monkeypatch):
    monkeypatch.setenv("TELL_AT", "19")
    do_pretrain(make_config(tmp_path, hooks=[L(TellAt)()]))
    assert "model_final.pth" in checkpoints(tmp_path)


def test_both_processes_stop_after_the_same_step_when_one_is_signalled(tmp_path, monkeypatch):
    train = {"hooks": [L(TellAt)()]}
    launch(train_in_process, 2, device="cpu", args=(str(tmp_path / "whole"), False, train))
    monkeypatch.setenv("TELL_AT", "8")
    folder = tmp_path / "stopped"
    with pytest.raises(SystemExit) as stopped:
        launch(train_in_process, 2, device="cpu", args=(str(folder), False, train))
    assert stopped.value.code == STOPPED
    assert checkpoints(folder)[-1] == "model_0000009.pth"  # one step later
    launch(train_in_process, 2, device="cpu", args=(str(folder), True, train))
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert same_weights(folder, tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM, signal.SIGINT])
def test_each_signal_is_a_request_to_stop(monkeypatch, number, capfd):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    before = signal.getsignal(number)
    stop = StopRequest()
    with stop.listen():
        assert not stop.agreed()
        os.kill(os.getpid(), number)
        assert stop.agreed()
        if number == signal.SIGUSR2:  # a scheduler may repeat it
            os.kill(os.getpid(), number)
        else:
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), number)
    assert signal.getsignal(number) == before
    said = "stopping after this step, once its checkpoint is saved\n"
    assert capfd.readouterr().err == ("" if number == signal.SIGUSR2 else said)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_with_nothing_left_to_save_it_stops_at_once_except_in_a_job(monkeypatch, number):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    with StopRequest().listen(finished=lambda: True):
        with pytest.raises(Stopped):
            os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGUSR2)  # the final evaluation may well be done in time
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    stop = StopRequest()
    with stop.listen(finished=lambda: True):
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.agreed()


def test_ctrl_c_that_the_shell_has_turned_off_stays_off():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequest().listen():
            assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_run_in_a_thread_which_receives_no_signals_trains_as_usual(tmp_path):
    for name in ("main", "thread"):
        cfg = make_config(tmp_path / name, max_iter=4)
        if name == "main":
            do_pretrain(cfg)
        else:
            thread = threading.Thread(target=do_pretrain, args=(cfg,))
            thread.start()
            thread.join()
    assert len(metrics(tmp_path / "thread")) == 4
    assert metrics(tmp_path / "thread") == metrics(tmp_path / "main")


class TellsItself(Dataset):
    """Its worker gets a signal at each item, as SLURM gives it to every process of a job."""

    def __init__(self, *numbers):
        self.numbers = numbers

    def __len__(self):
        return 8

    def __getitem__(self, index):
        for number in self.numbers:
            os.kill(os.getpid(), number)
        return index

    def batch(self, seed, epoch, indices):
        return self[len(indices)]


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGINT])
def test_workers_forked_while_a_run_listens_ignore_its_signals(number):
    stop = StopRequest()
    with stop.listen():
        got = list(DataLoader(TellsItself(number), batch_size=None, num_workers=1))
    assert [int(i) for i in got] == list(range(8)) and not stop.received


@pytest.mark.parametrize("kind", ["plain", "pre-training", "fine-tuning"])
@pytest.mark.parametrize("in_job", [True, False])
def test_loader_workers_ignore_both_signals(monkeypatch, kind, in_job):
    monkeypatch.delenv("SUBMITIT_EXECUTOR", raising=False)
    if in_job:
        monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    both = TellsItself(signal.SIGUSR2, signal.SIGTERM)
    with StopRequest().listen():
        if kind == "plain":
            got = DataLoader(both, batch_size=None, num_workers=1, worker_init_fn=init_worker)
            assert [int(i) for i in got] == list(range(8))
        elif kind == "pre-training":
            assert list(PretrainLoader(both, 2, num_workers=1).iterate(0, 3)) == [2, 2, 2]
        else:
            mapper = lambda record: both[record["image_id"]]  # noqa: E731
            data = DetectionTrainData([{"image_id": i} for i in range(8)], mapper, 2, num_workers=1)
            assert [len(batch) for batch in data.iterate(0, 3)] == [2, 2, 2]
