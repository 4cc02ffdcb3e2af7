"""Weights that lie: each flipped bit of a file with checksums is found before training."""

import pickle

import pytest
import torch
from damage import changes, fuzz, outcome
from hypothesis import given

from region_pretrain.convert.export import write_export
from region_pretrain.convert.recognise import read_weights
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError


class Detector(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.roi_heads = torch.nn.Module()
        self.roi_heads.box_head = torch.nn.Module()
        self.roi_heads.box_head.fc1 = torch.nn.Linear(30, 4)


@pytest.fixture
def exported(tmp_path):
    """suffix -> file with the same weights."""
    torch.manual_seed(0)
    content = {"model": Detector().state_dict(), "thing_classes": ["cat", "dog"]}
    files = {"pth": tmp_path / "x.pth"}
    torch.save(content, files["pth"])
    for suffix, to in (("safetensors", "safetensors"), ("pkl", "detectron2")):
        files[suffix] = tmp_path / f"y.{suffix}"
        write_export(str(files["pth"]), to, str(files[suffix]))
    return files


def contents(path):
    weights = read_weights(str(path))
    tensors = {name: tensor.numpy().tobytes() for name, tensor in weights.tensors.items()}
    return tensors, weights.facts, weights.classes


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_fuzzed_weights_are_the_same_or_refused(exported, suffix):
    path = exported[suffix]
    data, expected = path.read_bytes(), contents(path)
    assert len(expected[0]) == 2
    refused = []

    @fuzz(200)
    @given(change=changes())
    def run(change):
        path.write_bytes(change(data))
        found = outcome(lambda: contents(path))
        if isinstance(found, UserError):
            assert path.name in str(found)
            refused.append(found)
        else:
            assert found == expected

    run()
    assert len(refused) > 100


@pytest.mark.parametrize("suffix", ["pth", "safetensors", "pkl"])
def test_every_bit_of_the_tensors(exported, suffix):
    path = exported[suffix]
    data = path.read_bytes()
    torch.manual_seed(0)
    values = Detector().roi_heads.box_head.fc1.bias.detach().numpy().tobytes()
    start = data.index(values)
    for at in range(start, start + len(values)):
        changed = bytearray(data)
        changed[at] ^= 1 << at % 8
        path.write_bytes(changed)
        with pytest.raises(UserError, match="damaged"):
            load_pretrained(Detector(), str(path))


@pytest.mark.parametrize(
    "content",
    [
        b"epoch 3\nloss 0.1\n",
        b"eyes: [1, 2]\n",
        b"",
        b"PK",
        pickle.dumps(7),
        pickle.dumps({"model": None, "thing_classes": 7}),
        pickle.dumps({"blobs": 3}),
        b"(" * 100_000,
        b"." * 10,
    ],
    ids=range(9),
)
def test_other_files_are_one_line(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    error = outcome(lambda: load_pretrained(Detector(), str(path)))
    assert isinstance(error, UserError) and "weights.pth" in str(error)
