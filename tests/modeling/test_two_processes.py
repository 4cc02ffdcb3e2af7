"""Queue, shuffling, gathering and means in two gloo processes."""

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import spawn

from region_pretrain.engine.processes import leave_process_group
from region_pretrain.errors import UserError
from region_pretrain.modeling.gather import gather_rows, mean_over_ranks
from region_pretrain.modeling.norms import GhostBatchNorm, broadcast_statistics
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.shuffle import ImageShuffle, ShufflingBatchNorm

BATCH, WORLD = 5, 2


def per_rank(rank: int) -> dict:
    """What rank ``rank`` computes; its image i is number 10 rank + i and has i rows of vectors."""
    torch.manual_seed(0)
    queue = KeyQueue(7, 2)
    counts = [2, 3] if rank == 0 else [0, 4]
    for step, count in enumerate(counts):
        keys = torch.full((4, 2), -1.0)
        keys[:count] = 100.0 * step + 10 * rank + torch.arange(count)[:, None]
        queue.enqueue(keys, torch.arange(4) < count)

    shuffle = ImageShuffle(BATCH, (3, 8))
    images = 10 * rank + torch.arange(BATCH)
    received = shuffle.shuffle(images[:, None, None].float().expand(-1, 2, 3))
    counts = torch.arange(BATCH)
    received_counts = shuffle.shuffle(counts)
    # A vector for each row of each shuffled image: (number of the image, number of the row).
    vectors = [
        torch.tensor([[float(image), float(row)] for row in range(int(count))]).reshape(-1, 2)
        for image, count in zip(received[:, 0, 0], received_counts, strict=True)
    ]
    back = shuffle.unshuffle(torch.cat(vectors), received_counts, counts)
    expected = torch.tensor(
        [[10.0 * rank + i, float(row)] for i in range(BATCH) for row in range(i)]
    )
    assert torch.equal(back, expected)
    assert torch.equal(shuffle.unshuffle(received[:, 0, 0]), images.float())
    gathered = gather_rows(torch.tensor([[rank, 5.0], [rank, 6.0]], requires_grad=True))
    assert not gathered.requires_grad
    norms = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm1d(3, affine=False))
    for norm in (norms[0], norms[2]):
        norm.running_mean += 1 + rank
        norm.running_var += 3 + rank
    broadcast_statistics(norms)
    enabled, disabled = ShufflingBatchNorm(True, 3), ShufflingBatchNorm(False, 3)
    groups = ShufflingBatchNorm(True, 3, 2)
    return {
        "groups": groups.permutation(BATCH, 8).shuffle(images).tolist(),
        "queue": queue.keys[:, 0].tolist(),
        "pointer": int(queue.pointer),
        "shuffled": received[:, 0, 0].tolist(),
        "statistics": [
            values.tolist()
            for norm in (norms[0], norms[2])
            for values in (norm.running_mean, norm.running_var)
        ],
        "same": enabled.permutation(BATCH, 8).shuffle(images).tolist(),
        "other": enabled.permutation(BATCH, 9).shuffle(images).tolist(),
        "disabled": disabled.permutation(BATCH, 8).shuffle(images).tolist(),
        "mean": mean_over_ranks(torch.tensor(6.0 if rank else 3.0), 1 + 3 * rank).item(),
        "none": mean_over_ranks(torch.tensor(0.0), 0).item(),
        "rows": gathered.tolist(),
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(per_rank(rank), f"{folder}/{rank}.pt")
    leave_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_queues_are_identical_with_different_numbers_of_keys(seen):
    assert seen[0]["queue"] == seen[1]["queue"] and seen[0]["pointer"] == seen[1]["pointer"]
    # Step 0: 0 and 1 of rank 0; step 1: 100 to 102 of rank 0, then 110 to 113 of rank 1.
    assert seen[0]["queue"] == [112, 113, 100, 101, 102, 110, 111] and seen[0]["pointer"] == 2


def test_each_image_is_sent_to_one_place_over_all_processes(seen):
    shuffled = seen[0]["shuffled"] + seen[1]["shuffled"]
    assert sorted(shuffled) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and shuffled != sorted(shuffled)
    assert any(image >= 10 for image in seen[0]["shuffled"])
    assert seen[0]["same"] + seen[1]["same"] == shuffled
    assert seen[0]["other"] + seen[1]["other"] != shuffled
    assert seen[0]["disabled"] + seen[1]["disabled"] == sorted(shuffled)


def test_the_mean_is_over_the_items_of_all_processes(seen):
    # (3 + 6) / (1 + 4), as the average of the two.
    assert (seen[0]["mean"] + seen[1]["mean"]) / 2 == pytest.approx(9 / 5)
    assert seen[0]["none"] == seen[1]["none"] == 0
    assert seen[0]["rows"] == seen[1]["rows"] == [[0, 5], [0, 6], [1, 5], [1, 6]]


def test_a_single_process_shuffles_if_its_norms_see_groups():
    result = per_rank(0)
    assert result["same"] == result["other"] == [0, 1, 2, 3, 4]  # one group
    assert sorted(result["shuffled"]) == [0, 1, 2, 3, 4] != result["shuffled"]
    assert result["groups"] == result["shuffled"]


def test_the_batch_size_of_norms_is_positive():
    with pytest.raises(UserError, match="model.norm_batch_size=0 must be positive or null"):
        ShufflingBatchNorm(True, 0, 0)


def test_norms_are_per_process_only_if_shuffling_is_enabled():
    for enabled, size, kind in (
        (True, None, nn.BatchNorm2d),
        (True, 8, GhostBatchNorm),
        (False, 8, nn.SyncBatchNorm),
    ):
        network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.SyncBatchNorm(4))
        assert ShufflingBatchNorm(enabled, None, size).prepare(network) is network
        assert type(network[1]) is kind


def test_statistics_are_those_of_the_first_process(seen):
    for rank in seen:
        assert rank["statistics"] == [[1.0] * 2, [4.0] * 2, [1.0] * 3, [4.0] * 3]
