"""Queue, shuffle and means under two gloo processes."""

import pytest
import torch
from torch import distributed as dist
from torch.multiprocessing import spawn

from region_pretrain.modeling.gather import gather_rows, mean_over_ranks
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.shuffle import ImageShuffle

BATCH, WORLD = 5, 2


def per_rank(rank: int) -> dict:
    """What rank ``rank`` sees; images are numbered 10 r + i, and image i has i rows of vectors."""
    torch.manual_seed(0)
    queue = KeyQueue(7, 2)
    counts = [2, 3] if rank == 0 else [0, 4]
    for step, count in enumerate(counts):
        keys = torch.full((4, 2), -1.0)
        keys[:count] = 100.0 * step + 10 * rank + torch.arange(count)[:, None]
        queue.enqueue(keys, torch.arange(4) < count)

    shuffle = ImageShuffle(BATCH, (3, 8))
    images = 10 * rank + torch.arange(BATCH)
    dealt = shuffle.deal(images[:, None, None].float().expand(-1, 2, 3))
    rows = torch.arange(BATCH)
    dealt_rows = shuffle.deal(rows)
    # A vector for each row of each dealt image: (number of the image, number of the row).
    vectors = [
        torch.tensor([[float(image), float(row)] for row in range(int(count))]).reshape(-1, 2)
        for image, count in zip(dealt[:, 0, 0], dealt_rows, strict=True)
    ]
    back = shuffle.collect(torch.cat(vectors), dealt_rows, rows)
    expected = torch.tensor(
        [[10.0 * rank + i, float(row)] for i in range(BATCH) for row in range(i)]
    )
    one = torch.ones(BATCH, dtype=torch.int64)
    assert torch.equal(back, expected)
    assert torch.equal(shuffle.collect(dealt[:, 0, 0], one, one), images.float())
    return {
        "queue": queue.keys[:, 0].tolist(),
        "pointer": int(queue.pointer),
        "dealt": dealt[:, 0, 0].tolist(),
        "other": ImageShuffle(BATCH, (3, 9)).deal(images).tolist(),
        "mean": mean_over_ranks(torch.tensor(6.0 if rank else 3.0), 1 + 3 * rank).item(),
        "none": mean_over_ranks(torch.tensor(0.0), 0).item(),
        "rows": gather_rows(torch.tensor([[rank, 5]])).tolist(),
    }


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(per_rank(rank), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    spawn(_rank, (str(folder),), nprocs=WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def test_queues_are_in_step_with_different_numbers_of_keys(seen):
    assert seen[0]["queue"] == seen[1]["queue"] and seen[0]["pointer"] == seen[1]["pointer"]
    # Step 0: 0 and 1 of rank 0; step 1: 100 to 102 of rank 0, then 110 to 113 of rank 1.
    assert seen[0]["queue"] == [112, 113, 100, 101, 102, 110, 111] and seen[0]["pointer"] == 2


def test_images_are_dealt_to_other_processes_once_each(seen):
    dealt = seen[0]["dealt"] + seen[1]["dealt"]
    assert sorted(dealt) == [0, 1, 2, 3, 4, 10, 11, 12, 13, 14] and dealt != sorted(dealt)
    assert any(image >= 10 for image in seen[0]["dealt"])
    assert seen[0]["other"] + seen[1]["other"] != dealt  # of another key


def test_the_mean_is_over_the_items_of_all_processes(seen):
    # (3 + 6) / (1 + 4), as the average of the two.
    assert (seen[0]["mean"] + seen[1]["mean"]) / 2 == pytest.approx(9 / 5)
    assert seen[0]["none"] == seen[1]["none"] == 0
    assert seen[0]["rows"] == seen[1]["rows"] == [[0, 5], [1, 5]]


def test_one_process_alone_is_dealt_its_own_images():
    result = per_rank(0)
    assert sorted(result["dealt"]) == [0, 1, 2, 3, 4] != result["dealt"]
