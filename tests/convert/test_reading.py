"""Which files are read, and that none of them runs code."""

import argparse
import datetime
import functools
import importlib
import os
import pathlib
import pickle
import subprocess
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file

from region_pretrain.convert.reading import read_checkpoint
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
    read = read_checkpoint(write(tmp_path, content, protocol))
    assert read["__author__"] == "x" and read["matching_heuristics"] is True
    for name, value in weights.items():
        if isinstance(value, np.generic):
            assert read["model"][name] == value
        else:
            expected = torch.as_tensor(value).detach()
            assert torch.equal(read["model"][name], expected)
            assert read["model"][name].dtype == expected.dtype


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
    with pytest.raises(UserError, match=r"weights.pkl: it is damaged, or not a checkpoint.*exec"):
        read_checkpoint(path)
    assert not hasattr(sys, "ran_from_pickle")


def test_a_missing_file_is_not_called_damaged(tmp_path):
    with pytest.raises(UserError, match="none.pkl: no such file"):
        read_checkpoint(str(tmp_path / "none.pkl"))


class EasyDict(dict):
    """As in the package of this name, which need not be installed to read a file."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__.update(entries)


def with_run_settings() -> dict:
    """Weights beside objects that only describe the run."""
    return {
        "state_dict": OrderedDict(a=torch.arange(6.0).reshape(2, 3), b=torch.ones(2).bfloat16()),
        "args": argparse.Namespace(lr=0.1, data=pathlib.PurePosixPath("/data"), names={"x"}),
        "config": OmegaConf.create({"model": {"depth": 50}, "list": [1, 2]}),
        "easy": EasyDict(a=1, b=[2]),
        "logs": defaultdict(list, loss=[1.0, 2.0]),
        "date": datetime.date(2024, 5, 1),
        "epoch": 7,
    }


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_settings_of_a_run_are_no_obstacle(tmp_path, form):
    content, path = with_run_settings(), tmp_path / "checkpoint.any"
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    read = read_checkpoint(str(path))
    assert torch.equal(read["state_dict"]["a"], torch.arange(6.0).reshape(2, 3))
    assert read["state_dict"]["b"].dtype == torch.bfloat16
    assert read["epoch"] == 7
    assert type(read["args"]).__name__ == "_Inert" and not read["args"]


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize(
    "function, arguments",
    [
        (exec, ("import sys; sys.ran_from_pickle = True",)),
        (os.system, ("true",)),
        (subprocess.Popen, (["true"],)),
        (getattr, ("text", "upper")),
        (functools.partial, (os.getcwd,)),
        (importlib.import_module, ("antigravity",)),
        (torch.load, ("x.pth",)),
        (torch.hub.load, ("a/b", "c")),
        (np.load, ("x.npy",)),
    ],
)
def test_functions_are_refused_in_every_format(tmp_path, form, function, arguments):
    class Calls:
        def __reduce__(self):
            return function, arguments

    path = tmp_path / "evil.any"
    content = {"model": {"a": torch.ones(2)}, "extra": Calls()}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(UserError, match="evil.any: it is damaged, or .* could run code"):
        read_checkpoint(str(path))
    assert not hasattr(sys, "ran_from_pickle")


def test_an_unknown_package_s_function_is_not_called(tmp_path, monkeypatch):
    called = []
    module = types.ModuleType("some_package")

    def run(*args):
        called.append(args)

    run.__module__ = module.__name__ = "some_package"
    run.__qualname__ = "run"
    module.run = run
    monkeypatch.setitem(sys.modules, "some_package", module)

    class Calls:
        def __reduce__(self):
            return run, ("x",)

    path = write(tmp_path, {"model": {"a": np.ones(2)}, "extra": Calls()})
    assert torch.equal(read_checkpoint(path)["model"]["a"], torch.ones(2).double())
    assert called == []


def test_safetensors_are_recognised_by_content(tmp_path):
    path = tmp_path / "weights.pth"
    save_file({"a": torch.ones(2, 3), "b": torch.zeros(1).half()}, path, {"format": "pt"})
    read = read_checkpoint(str(path))
    assert torch.equal(read["model"]["a"], torch.ones(2, 3))
    assert read["model"]["b"].dtype == torch.float16 and read["metadata"] == {"format": "pt"}


@pytest.mark.parametrize("bit", range(8))
def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path, bit):
    path = tmp_path / "weights.pth"
    torch.save({"model": {"a": torch.arange(4096.0)}}, path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1 << bit
    path.write_bytes(data)
    with pytest.raises(UserError, match="weights.pth: it is damaged.*checksum"):
        read_checkpoint(str(path))
