"""Copies that do not make the host wait."""

import pytest
import torch

from region_pretrain.data.device import to_device


@pytest.fixture
def locked(monkeypatch):
    """Shapes and strides of what is page-locked, on a machine without a GPU."""
    found = []

    def pin_memory(tensor):
        found.append((tuple(tensor.shape), tensor.stride()))
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: False)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    return found


def test_only_what_the_driver_does_not_stage_is_page_locked(locked):
    to_device(torch.zeros(1 << 14), "cuda")  # 64 kB
    for device in ("cpu", "meta"):
        to_device(torch.zeros(1 << 15), device)
    to_device(torch.zeros(1 << 15, device="meta"), "cuda")
    assert locked == []
    to_device(torch.zeros((1 << 14) + 1), "cuda")
    assert locked == [((16385,), (1,))]


def test_a_copy_needs_no_temporary_in_pageable_memory(locked):
    """CUDA stages a source whose strides are not those of the copy."""
    to_device(torch.zeros(4, 40_000)[:, ::2], "cuda")
    images = torch.zeros(2, 64, 64, 3).permute(0, 3, 1, 2)  # channels-last
    to_device(images, "cuda")
    assert locked == [((4, 20_000), (20_000, 1)), ((2, 3, 64, 64), (12288, 1, 192, 3))]


def test_what_is_page_locked_already_is_copied_as_it_is(locked, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    to_device(torch.zeros(1 << 20), "cuda")
    assert locked == []
