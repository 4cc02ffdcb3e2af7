import io
import random

import numpy as np
import torch

from region_pretrain.random_state import (
    get_random_state,
    random_state_of,
    set_random_state,
)


def draw():
    return random.random(), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


def test_a_state_from_a_weights_only_file_continues_all_streams():
    np.random.randn()  # leaves the second half of a pair behind, which is part of the state
    random.gauss(0, 1)
    file = io.BytesIO()
    torch.save(get_random_state(), file)
    expected = [draw() for _ in range(3)], random.gauss(0, 1)
    draw()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert ([draw() for _ in range(3)], random.gauss(0, 1)) == expected


def test_a_seed_of_its_own_leaves_the_outer_streams_alone():
    state = get_random_state()
    expected = draw()
    set_random_state(state)
    with random_state_of(2**31 + 5):
        first = draw()
    with random_state_of(2**31 + 5):
        assert draw() == first
    with random_state_of(6):
        assert draw() != first
    assert draw() == expected
