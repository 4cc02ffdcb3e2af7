"""The key queue against a list that is written key by key."""

import numpy as np
import pytest
import torch
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.queue import KeyQueue


def numbered(start: int, count: int) -> torch.Tensor:
    return torch.arange(start, start + count, dtype=torch.float32)[:, None].expand(-1, 2)


def test_it_starts_full_of_unit_vectors():
    queue = KeyQueue(500, 16)
    torch.testing.assert_close(queue.keys.norm(dim=1), torch.ones(500))
    assert queue.keys.mean().abs() < 0.02 and queue.pointer == 0 and len(queue) == 500


def test_wraps_without_dropping_keys():
    """Length 10, pointer 8, five keys: MoCo's released code would write only two of them."""
    queue = KeyQueue(10, 2)
    queue.enqueue(numbered(100, 8))
    queue.enqueue(numbered(200, 5))
    assert queue.pointer == 3
    assert queue.keys[:, 0].tolist() == [202, 203, 204, 103, 104, 105, 106, 107, 200, 201]


@pytest.mark.parametrize("length", [1, 7, 30])
def test_any_number_of_keys_equals_writing_one_by_one(length):
    rng = np.random.default_rng(length)
    queue = KeyQueue(length, 2)
    slow, place = queue.keys[:, 0].tolist(), 0
    for step in range(40):
        count = int(rng.integers(0, 24))
        keys = numbered(100 * step, count)
        valid = rng.random(count) < rng.choice([0.0, 0.5, 1.0])
        queue.enqueue(keys, torch.from_numpy(valid))
        for value, is_key in zip(keys[:, 0].tolist(), valid, strict=True):
            if is_key:
                slow[place] = value
                place = (place + 1) % length
        assert queue.keys[:, 0].tolist() == slow and queue.pointer == place


def test_backward_works_after_the_queue_has_changed():
    queue, query = KeyQueue(4, 2), torch.ones(3, 2, requires_grad=True)
    expected = queue.keys.sum(dim=0).expand(3, 2).clone()
    loss = (query @ queue.negatives().T).sum()
    queue.enqueue(torch.zeros(4, 2))
    loss.backward()
    torch.testing.assert_close(query.grad, expected)


def test_its_state_is_in_the_state_dict():
    queue, other = KeyQueue(5, 2), KeyQueue(5, 2)
    queue.enqueue(numbered(0, 3))
    other.load_state_dict(queue.state_dict())
    for q in (queue, other):
        q.enqueue(numbered(10, 4))
    assert torch.equal(queue.keys, other.keys) and other.pointer == 2


def test_a_length_of_zero_is_an_error():
    with pytest.raises(UserError, match="length=0 and dim=128: both must be at least 1"):
        KeyQueue(0, 128)


def test_a_queue_of_another_width_than_its_head_is_named():
    head = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    KeyQueue(6, 4).check_head(head, "model.queue")
    with pytest.raises(UserError, match="model.queue.dim=5: must be 4, the output_dim of its head"):
        KeyQueue(6, 5).check_head(head, "model.queue")
