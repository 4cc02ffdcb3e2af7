"""What the trainer says about a model that returns something other than scalars by name."""

from __future__ import annotations

import re

import pytest
import torch
from tiny_run import Loader
from torch import nn

from region_pretrain.engine.trainer import Trainer
from region_pretrain.errors import UserError


class Model(nn.Module):
    """Returns what a function makes of its outputs, ``(B, 1)``."""

    def __init__(self, output):
        super().__init__()
        self.linear = nn.Linear(6, 1)
        self.output = output

    def forward(self, batch):
        return self.output(self.linear(batch.x))


def train(output):
    model = Model(output)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, optimizer, Loader(8).iterate, log_period=1)
    trainer.train(0, 2)
    return {name: value for name, (value, _) in trainer.storage.latest().items()}


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (lambda y: y.mean(), "returns a Tensor: return a dict of scalars, e.g. {'loss': value}"),
        (lambda y: {"loss_a": y.mean(), "loss_b": y},
         "returns 'loss_b', a tensor of shape (8, 1): return a scalar, e.g. its mean"),
        (lambda y: {"loss": y.mean(), "spread": y.detach()},
         "returns 'spread', a tensor of shape (8, 1): return a scalar"),
        (lambda y: {"loss": y.mean().item()},
         "returns 'loss', a float: a loss must be a tensor that has a gradient"),
        (lambda y: {"loss": y.mean(), "name": "x"},
         "returns 'name', a str: what is logged must be a scalar"),
    ],
)  # fmt: skip
def test_the_entry_at_fault_is_named(output, message):
    with pytest.raises(UserError, match=re.escape(message)):
        train(output)


def test_numbers_and_tensors_of_one_element_are_scalars():
    seen = train(lambda y: {"loss_a": y.mean().reshape(1), "loss_b": y.std(), "share": 0.25})
    assert seen["share"] == 0.25
    assert seen["total_loss"] == pytest.approx(seen["loss_a"] + seen["loss_b"])
