import torch
from torch import nn

from region_pretrain.solver import pretrain_param_groups


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 2)
        self.temperature = nn.Parameter(torch.tensor(0.1))
        self.target = nn.Linear(4, 2).requires_grad_(False)
        self.alias = self.head


def ids(params):
    return {id(p) for p in params}


def test_one_dimensional_parameters_neither_decay_nor_adapt():
    model = Model()
    decayed, excluded = pretrain_param_groups(model, weight_decay=1e-5)
    assert ids(decayed["params"]) == ids([model.conv.weight, model.head.weight])
    assert (decayed["weight_decay"], decayed["adapt"]) == (1e-5, True)
    assert ids(excluded["params"]) == ids(
        [
            model.conv.bias,
            model.norm.weight,
            model.norm.bias,
            model.head.bias,
            model.temperature,
        ]
    )
    assert (excluded["weight_decay"], excluded["adapt"]) == (0.0, False)
