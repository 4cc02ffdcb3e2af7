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
    return found


def test_only_what_the_driver_does_not_stage_is_page_locked(locked):
    assert to_device(torch.zeros(1 << 14), "meta").is_meta  # 64 kB
    assert to_device(torch.zeros(1 << 15), "cpu").device.type == "cpu"
    assert to_device(torch.zeros(1 << 15, device="meta"), "meta").is_meta
    assert locked == []
    to_device(torch.zeros((1 << 14) + 1), "meta")
    assert locked == [((16385,), (1,))]


def test_a_copy_needs_no_temporary_in_pageable_memory(locked):
    """CUDA stages a source whose strides are not those of the copy."""
    to_device(torch.zeros(4, 40_000)[:, ::2], "meta")
    images = torch.zeros(2, 3, 64, 64).to(memory_format=torch.channels_last)
    copy = to_device(images, "meta")
    assert locked == [((4, 20_000), (20_000, 1)), (tuple(images.shape), images.stride())]
    assert copy.is_contiguous(memory_format=torch.channels_last)


def test_what_is_page_locked_already_is_copied_as_it_is(locked, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda tensor: True)
    to_device(torch.zeros(1 << 20), "meta")
    assert locked == []
