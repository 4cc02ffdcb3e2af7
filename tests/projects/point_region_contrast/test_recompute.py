"""Sums in slices."""

from types import SimpleNamespace

import pytest
import torch

from region_pretrain.projects.point_region_contrast.recompute import (
    entries_at_once,
    recomputed_sum,
)


@pytest.mark.parametrize(("step", "calls"), [(1, 10), (2, 6), (4, 4), (5, 1), (99, 1)])
def test_slices_are_recomputed_unless_there_is_only_one(step, calls):
    x = torch.arange(5.0, requires_grad=True)
    seen = []

    def part(rows: slice) -> torch.Tensor:
        seen.append(rows)
        return (x[rows] ** 2).sum()

    total = recomputed_sum(part, 5, step)
    total.backward()
    assert total == 30 and x.grad.tolist() == [0, 2, 4, 6, 8]
    assert len(seen) == calls


def test_slices_follow_the_memory_of_a_gpu(monkeypatch):
    memory = {"small": 16 << 30, "large": 80 << 30}
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=memory[d.name])
    )
    found = {n: entries_at_once(SimpleNamespace(type="cuda", name=n)) for n in memory}
    assert found == {"small": 1 << 24, "large": 5 << 24}
    assert entries_at_once(torch.device("cpu")) == 1 << 22
