"""What a pickled checkpoint may contain."""

import pickle
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch

from region_pretrain.engine.safe_pickle import check_pickle
from region_pretrain.errors import UserError


class Runs:
    """An object whose loading runs code."""

    def __reduce__(self):
        return exec, ("import sys; sys.ran_from_pickle = True",)


def write(tmp_path, content, protocol=2) -> str:
    path = tmp_path / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return str(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("kind", ["arrays", "tensors"])
def test_arrays_and_tensors_pass(tmp_path, protocol, kind):
    weights = {
        "arrays": {"a": np.ones((2, 3), np.float32), "b": np.float32(3), "c": np.arange(4)},
        "tensors": OrderedDict(a=torch.ones(2), b=torch.nn.Parameter(torch.ones(3).half())),
    }[kind]
    content = {"model": weights, "__author__": "x", "matching_heuristics": True}
    assert check_pickle(write(tmp_path, content, protocol)) is None


@pytest.mark.parametrize("where", ["beside", "in an array", "in a storage"])
def test_code_is_refused_wherever_it_hides(tmp_path, where):
    if where == "beside":
        content = {"model": {"a": np.ones(2)}, "extra": Runs()}
    elif where == "in an array":
        content = {"model": {"a": np.array([Runs(), None], dtype=object)}}
    else:
        inner = tmp_path / "inner.pth"
        torch.save(Runs(), inner)

        class Storage:
            def __reduce__(self):
                return torch.storage._load_from_bytes, (inner.read_bytes(),)

        content = {"model": {"a": Storage()}}
    path = write(tmp_path, content)
    with pytest.raises(UserError, match=r"weights.pkl is damaged or not a checkpoint.*exec"):
        check_pickle(path)
    assert not hasattr(sys, "ran_from_pickle")


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(FileNotFoundError):
        check_pickle(str(tmp_path / "none.pkl"))
