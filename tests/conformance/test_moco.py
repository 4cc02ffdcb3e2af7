"""MoCo v2's training steps against the paper's formulas (arXiv 1911.05722 and 2003.04297)."""

import numpy as np
import pytest
import torch
from fvcore.common.param_scheduler import ConstantParamScheduler
from parts import PIXELS, dot, enqueue, pixels, prepare, small_trunk, spread, two_crops, unit
from training_step import Case, Restatement, check_one_process

from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.moco import MoCo

MOMENTUM, TEMPERATURE, SEED = 0.8, 0.3, 5


def moco_case(images: int, length: int, precision: str = "float64", shuffle: bool = True) -> Case:
    torch.manual_seed(0)
    model = MoCo(
        backbone=Trunk(bottom_up=small_trunk()),
        feature="res5",
        head=MLPHead(64, 24, 12, norm=""),
        queue=KeyQueue(length, 12),
        momentum=ConstantParamScheduler(MOMENTUM),
        temperature=TEMPERATURE,
        shuffle=shuffle,
        seed=SEED,
        input_format="RGB",
        **PIXELS,
    )
    return Case(prepare(model, precision), two_crops(images, steps=3), precision)


class SlowMoCo(Restatement):
    """With two twins, batch norm is per process and key images are shuffled between them."""

    def copies(self, twin):
        return [(twin.backbone, twin.key["backbone"]), (twin.head, twin.key["head"])]

    def momentum(self, progress):
        return MOMENTUM

    def embed(self, trunk, head, x):
        return self.call(head, self.call(trunk, x)["res5"].mean(dim=(2, 3)))

    def forward(self, batches):
        size = len(batches[0])
        images = [[pixels(view, self.precision.dtype) for view in b.views] for b in batches]
        queries = [
            unit(self.embed(twin.backbone, twin.head, x))
            for twin, (x, _) in zip(self.twins, images, strict=True)
        ]
        # Section 3.3: the key images of all processes in another order, known to all of them.
        key_images = [x for _, of_rank in images for x in of_rank]
        order = list(range(len(key_images)))
        if len(self.twins) > 1:
            generator = np.random.default_rng([SEED, self.iteration])
            order = generator.permutation(len(key_images)).tolist()
        keys = {}
        for rank, twin in enumerate(self.twins):
            mine = order[rank * size : (rank + 1) * size]
            x = torch.stack([key_images[i] for i in mine])
            vectors = unit(self.embed(twin.key["backbone"], twin.key["head"], x))
            keys.update(zip(mine, vectors.detach(), strict=True))
        outputs, queue = [], list(self.twins[0].queue.keys)
        for rank, of_rank in enumerate(queries):
            loss, own = 0.0, [keys[rank * size + i] for i in range(size)]
            for q, k in zip(of_rank, own, strict=True):  # equation 1
                positive = torch.exp(dot(q, k) / TEMPERATURE)
                negatives = sum(torch.exp(dot(q, n) / TEMPERATURE) for n in queue)
                loss = loss - torch.log(positive / (positive + negatives)) / size
            outputs.append({"loss_image": loss, "embedding_std": spread(own)})
        enqueue([twin.queue for twin in self.twins], [keys[i] for i in range(len(keys))])
        return outputs


@pytest.mark.parametrize(
    ("length", "precision"),
    # The third batch of 4 passes the end of a queue of 10; a queue of 3 is shorter than a batch.
    [(10, "float64"), (3, "float64"), (10, "float32"), (10, "bfloat16")],
)
def test_three_steps(length, precision):
    case = moco_case(4, length, precision)
    records = check_one_process(case, SlowMoCo(case))
    assert records[2].state["queue.pointer"] == 12 % length


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_three_steps_in_two_processes_with_shuffled_keys(two_processes, precision):
    case = moco_case(8, 10, precision)
    found = two_processes.check(case, SlowMoCo(case, ranks=2))
    means = [rank[0].state["key.backbone.bottom_up.stem.conv1.norm.running_mean"] for rank in found]
    assert not torch.allclose(*means)  # of each process's own images


def test_three_steps_in_two_processes_with_shared_statistics(two_processes):
    case = moco_case(8, 10, shuffle=False)
    two_processes.check(case, SlowMoCo(case))
