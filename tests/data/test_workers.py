"""What loader workers put into shared memory, and what happens when it is full."""

import os
import socket
import time
from multiprocessing import resource_sharer

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Boxes, Instances
from forked import LONG, Process
from torch.utils.data import DataLoader

from region_pretrain.data.loader import PretrainLoader
from region_pretrain.data.workers import (
    init_worker,
    prefetched_bytes,
    share,
    share_batches_of,
)
from region_pretrain.engine.detection_data import DetectionTrainData

FULL = "unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)"


def record(index: int = 0) -> dict:
    """An image of 3 * 4 * 5 bytes, 2 boxes of 16 bytes, 2 classes of 8 and 2 masks of 4 * 5."""
    instances = Instances((4, 5))
    instances.gt_boxes = Boxes(torch.zeros(2, 4))
    instances.gt_classes = torch.zeros(2, dtype=torch.int64)
    instances.gt_masks = BitMasks(torch.zeros(2, 4, 5, dtype=torch.bool))
    image = torch.zeros(3, 4, 5, dtype=torch.uint8)
    return {"file_name": "a.jpg", "image": image, "instances": instances, "x": np.zeros(9)}


def test_the_size_of_prefetched_batches():
    # 60 + 32 + 16 + 40 bytes per image; 3 workers prepare 2 batches each, one is in use
    loads = []
    size = prefetched_bytes(lambda: loads.append(1) or [record()], batch_size=8, num_workers=3)
    assert size == (60 + 32 + 16 + 40) * 8 * 7 and loads == [1]
    assert prefetched_bytes(lambda: pytest.fail("loaded"), batch_size=8, num_workers=0) == 0


def test_the_size_is_that_of_the_loaders_batches(pretrain_dataset):
    loader = PretrainLoader(pretrain_dataset, 4, num_workers=2, seed=1)
    state = torch.get_rng_state()
    size = loader.prefetched_bytes()
    assert torch.equal(torch.get_rng_state(), state)
    batch = next(iter(loader.iterate(0, 1)))
    tensors = [batch.indices, *(t for view in batch.views for t in vars(view).values())]
    assert size == 5 * sum(t.numel() * t.element_size() for t in tensors)
    detection = DetectionTrainData([{"image_id": 0}], lambda _: record(), 2, num_workers=1)
    assert detection.prefetched_bytes() == 148 * 2 * 3


def test_a_worker_shares_every_tensor_of_its_batch():
    batch = [record()]
    share(batch)
    assert not batch[0]["image"].is_shared()  # the training process needs no shared memory
    loader = DataLoader([0], collate_fn=lambda _: shared_tensors(share([record()])), num_workers=1)
    assert list(loader) == [[True] * 4]


def shared_tensors(batch):
    fields = batch[0]["instances"].get_fields()
    tensors = (batch[0]["image"], fields["gt_boxes"].tensor, fields["gt_classes"])
    return [t.is_shared() for t in (*tensors, fields["gt_masks"].tensor)]


@pytest.mark.parametrize("kind", ["pretraining", "detection", "test"])
def test_full_shared_memory_ends_a_run_instead_of_hanging(kind, pretrain_dataset, monkeypatch):
    def fail(self):
        raise RuntimeError(FULL)

    monkeypatch.setattr(torch.Tensor, "share_memory_", fail)
    if kind == "pretraining":
        batches = PretrainLoader(pretrain_dataset, 4, num_workers=1).iterate(0, 2)
    elif kind == "detection":
        data = DetectionTrainData([{"image_id": 0}], lambda _: record(), 1, num_workers=1)
        batches = data.iterate(0, 2)
    else:
        loader = DataLoader([0], collate_fn=lambda _: [record()], num_workers=1)
        share_batches_of(loader)
        batches = iter(loader)
    with pytest.raises(RuntimeError, match="unable to allocate shared memory"):
        next(batches)


@pytest.mark.parametrize("worker", [True, False])
def test_a_worker_is_silent_when_its_reader_leaves(tmp_path, worker):
    # The training process fails with an error of its own; the worker's would be a traceback.
    def serve():
        if worker:
            init_worker(0)
        resource_sharer._resource_sharer = resource_sharer._ResourceSharer()
        (tmp_path / "address").write_text(resource_sharer.DupFd(0)._id[0])
        time.sleep(60)

    process = Process(serve, tmp_path / "output")
    try:
        address = until(lambda: (tmp_path / "address").read_text())
        for _ in range(2):
            with socket.socket(socket.AF_UNIX) as reader:
                reader.connect(address)
        with socket.socket(socket.AF_UNIX) as reader:
            reader.connect(address)
            assert reader.recv(4)  # served in order: the other two have failed
            text = (tmp_path / "output").read_text()
        assert text == "" if worker else text.count("Traceback") == 2, text
    finally:
        os.kill(process.pid, 9)
        process.wait(LONG)


def until(read):
    deadline = time.monotonic() + LONG
    while True:
        try:
            if text := read():
                return text
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.01)
