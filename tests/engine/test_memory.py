import random

import numpy as np
import pytest
import torch
from tiny_run import Loader, make_config
from torch import distributed as dist

from region_pretrain.engine import memory
from region_pretrain.engine.memory import check_shared_memory
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError

MIB = 2**20


class Workers(Loader):
    """Says how much shared memory it needs; draws random numbers to find out."""

    def __init__(self, needed: int, **options) -> None:
        super().__init__(**options)
        self.needed = needed

    def prefetched_bytes(self) -> int:
        torch.rand(1), np.random.rand(), random.random()
        if self.needed < 0:
            raise OSError("no such image")
        return self.needed


def draws():
    return torch.rand(1).item(), np.random.rand(), random.random()


def test_batches_must_fit_in_shared_memory_on_every_machine(monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda folder: {"/dev/shm": 64 * MIB}[folder])
    check_shared_memory(Workers(64 * MIB))
    with pytest.raises(UserError) as error:
        check_shared_memory(Workers(64 * MIB + 1))
    assert str(error.value) == (
        "/dev/shm has 64 MiB free, but the batches of the loader's workers need 64 MiB: lower "
        "dataloader.train.num_workers (0 needs none) or dataloader.train.total_batch_size, or "
        "enlarge /dev/shm (docker run --shm-size=1g)"
    )
    monkeypatch.setattr(memory.comm, "get_local_size", lambda: 4)
    check_shared_memory(Workers(16 * MIB))
    with pytest.raises(UserError, match="need 2000 MiB: .*--shm-size=3g"):
        check_shared_memory(Workers(500 * MIB))
    # another machine finds that they do not fit
    monkeypatch.setattr(memory.comm, "all_gather", lambda message: [message, "n2 has too little"])
    with pytest.raises(UserError, match="n2 has too little"):
        check_shared_memory(Workers(0))


@pytest.mark.parametrize("free, needed", [(None, 10**15), (0, 0), (0, -1)])
def test_what_cannot_be_measured_is_not_refused(monkeypatch, free, needed):
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    check_shared_memory(Workers(needed))
    check_shared_memory(Loader())  # no such method


def test_the_check_draws_no_random_numbers():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = draws()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    check_shared_memory(Workers(1))
    assert draws() == expected


def test_a_run_whose_batches_do_not_fit_does_not_start(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda _: 0)
    cfg = make_config(tmp_path)
    cfg.dataloader.train._target_ = Workers
    cfg.dataloader.train.needed = MIB
    with pytest.raises(UserError, match="/dev/shm has 0 MiB free"):
        do_pretrain(cfg)
    assert not (tmp_path / "metrics.json").exists()


@pytest.mark.parametrize(
    "text",
    [
        "RuntimeError: unable to allocate shared memory(shm) for file: No space left on device",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that "
        "dataloader's workers are out of shared memory.",
    ],
)
def test_shared_memory_that_fills_up_later_ends_the_run_in_one_line(tmp_path, monkeypatch, text):
    def iterate(self, start, stop, original=Loader.iterate):
        yield from original(self, start, 3)
        raise RuntimeError(text)

    monkeypatch.setattr(Loader, "iterate", iterate)
    with pytest.raises(UserError, match="workers ran out of shared memory: lower .*num_workers"):
        do_pretrain(make_config(tmp_path))


def test_a_failure_of_nccl_is_not_blamed_on_the_loader(tmp_path, monkeypatch):
    def iterate(self, start, stop):
        raise dist.DistBackendError(
            "NCCL error: while creating shared memory segment /dev/shm/nccl"
        )
        yield

    monkeypatch.setattr(Loader, "iterate", iterate)
    with pytest.raises(dist.DistBackendError, match="while creating shared memory segment"):
        do_pretrain(make_config(tmp_path))
