"""The loader: samples do not depend on workers, ranks or where a run resumes."""

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils import comm

from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine.trainer import Trainer
from region_pretrain.errors import UserError


def flat(batch):
    return [t for view in batch.views for t in vars(view).values()] + [batch.indices]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(flat(a), flat(b), strict=True))


@pytest.mark.parametrize("workers", [1, 3])
def test_samples_do_not_depend_on_the_number_of_workers(pretrain_dataset, workers):
    plain = PretrainLoader(pretrain_dataset, 4, num_workers=0, seed=3)
    other = PretrainLoader(pretrain_dataset, 4, num_workers=workers, seed=3)
    pairs = list(zip(plain.iterate(0, 7), other.iterate(0, 7), strict=True))
    assert len(pairs) == 7 and all(same(a, b) for a, b in pairs)


def test_a_resumed_loader_continues_with_the_next_sample(pretrain_dataset):
    loader = PretrainLoader(pretrain_dataset, 4, num_workers=0, seed=3)
    whole, rest = list(loader.iterate(0, 9)), list(loader.iterate(5, 9))
    assert all(same(a, b) for a, b in zip(whole[5:], rest, strict=True))


def test_every_image_once_per_epoch_in_a_new_order(pretrain_dataset):
    loader = PretrainLoader(pretrain_dataset, 4, num_workers=0)
    size, per_epoch = len(pretrain_dataset), loader.iterations_per_epoch
    assert per_epoch == size // 4
    epochs = [
        torch.cat([b.indices for b in loader.iterate(e * per_epoch, (e + 1) * per_epoch)]).tolist()
        for e in range(2)
    ]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(size))
    assert epochs[0] != epochs[1]


def test_a_sample_is_a_function_of_seed_epoch_and_index(pretrain_dataset):
    orders, affines = {}, {}
    for seed in (3, 4):
        loader = PretrainLoader(pretrain_dataset, 4, num_workers=0, seed=seed)
        per_epoch = loader.iterations_per_epoch
        for i, batch in enumerate(loader.iterate(0, 2 * per_epoch)):
            epoch, indices = i // per_epoch, batch.indices.tolist()
            assert same(batch, pretrain_dataset.batch(seed, epoch, indices))
            orders.setdefault((seed, epoch), []).extend(indices)
            for index, affine in zip(indices, batch.views[1].affine.tolist(), strict=True):
                affines.setdefault(index, []).append(str(affine))
    assert len({str(order) for order in orders.values()}) == 4
    assert all(len(set(mine)) == 4 for mine in affines.values())
    assert len(affines) == len(pretrain_dataset)


def test_the_batches_of_all_ranks_are_the_global_batch(pretrain_dataset, monkeypatch):
    whole = next(PretrainLoader(pretrain_dataset, 6, num_workers=0).iterate(1, 2))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(comm, "get_world_size", lambda: 3)
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        parts.append(next(PretrainLoader(pretrain_dataset, 6, num_workers=0).iterate(1, 2)))
    for i, tensor in enumerate(flat(whole)):
        torch.testing.assert_close(torch.cat([flat(p)[i] for p in parts]), tensor)


def test_micro_batches_in_order(pretrain_dataset):
    batch = next(PretrainLoader(pretrain_dataset, 6, num_workers=0).iterate(0, 1))
    parts = batch.chunk(3)
    assert [len(p) for p in parts] == [2, 2, 2]
    for i, tensor in enumerate(flat(batch)):
        torch.testing.assert_close(torch.cat([flat(p)[i] for p in parts]), tensor)
    assert [len(p) for p in batch.chunk(4)] == [1, 2, 1, 2]


def test_images_are_channels_last_and_match_their_affine(pretrain_dataset):
    view = next(PretrainLoader(pretrain_dataset, 6, num_workers=0).iterate(0, 1)).views[0]
    assert view.images.dtype == torch.uint8
    assert view.images.is_contiguous(memory_format=torch.channels_last)
    side = view.images.shape[-1]
    corners = np.array([[0.0, 0.0, 1.0], [64, 64, 1]])  # of the 64-pixel originals
    mapped = corners @ view.affine[0].numpy().T
    assert np.allclose(sorted(mapped[:, 0]), [0, side]) and np.allclose(mapped[:, 1], [0, side])


def test_too_large_a_batch_is_refused(pretrain_dataset):
    with pytest.raises(UserError, match="total_batch_size"):
        PretrainLoader(pretrain_dataset, len(pretrain_dataset) + 1)


def test_an_error_in_a_worker_is_one_clear_line(pretrain_dataset):
    cv2.imwrite(pretrain_dataset._records[0][0], np.zeros((32, 64, 3), np.uint8))
    loader = PretrainLoader(pretrain_dataset, 12, num_workers=1)
    model = torch.nn.Linear(1, 1)
    trainer = Trainer(model, torch.optim.SGD(model.parameters(), 0.1), loader.iterate)
    with pytest.raises(UserError) as error:
        trainer.train(0, 1)
    text = str(error.value)
    assert "64x32" in text and "make the regions again" in text
    assert "Traceback" not in text and "\n" not in text
