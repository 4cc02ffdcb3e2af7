"""Every LazyConfig of Detectron2's model zoo can be saved, and so can the user's own."""

import os
import pickle

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from detectron2.layers import NaiveSyncBatchNorm
from torch import nn

from region_pretrain.config import changed_keys, load_config, load_file, to_yaml
from region_pretrain.errors import UserError
from region_pretrain.lazy import unsaveable, value_of

ZOO = os.path.dirname(model_zoo.get_config_file("Base-RCNN-FPN.yaml"))
CONFIGS = sorted(
    os.path.relpath(os.path.join(folder, name), ZOO)
    for folder, _, names in os.walk(ZOO)
    for name in names
    if name.endswith(".py")
)
LSJ = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"

OWN = """
from functools import partial
from detectron2.config import LazyCall as L
from torch import nn

def block(width, scale=2):
    return nn.Linear(width, scale * width)

class Net(nn.Module):
    def __init__(self, body, norm):
        super().__init__()
        self.body, self.norm = body, norm(4)

model = L(Net)(
    body=L(block)(width=3, scale="${train.scale}"), norm=partial(lambda c: nn.LayerNorm(c))
)
train = dict(scale=3, act=nn.ReLU, norms=[lambda: 1, "BN"])
"""


def test_the_zoo_is_complete():
    assert len(CONFIGS) >= 35 and LSJ in CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_again(name, tmp_path):
    cfg = load_file(name)
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg))
    assert path.stat().st_size < 20_000
    again = load_file(str(path))
    assert changed_keys(again, cfg) == {}
    assert to_yaml(again) == path.read_text()
    pickle.dumps(again)


def test_a_new_baseline_is_built_from_its_saved_config(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config(LSJ)))
    with torch.device("meta"):
        models = [instantiate(LazyConfig.load(str(file)).model) for file in (path, f"{ZOO}/{LSJ}")]
    norms = [m for m in models[0].roi_heads.modules() if isinstance(m, NaiveSyncBatchNorm)]
    assert len(norms) == 8 and {m._stats_mode for m in norms} == {"N"}
    states = [{k: v.shape for k, v in m.state_dict().items()} for m in models]
    assert states[0] == states[1]


def test_functions_and_classes_of_the_users_own_config(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(OWN)
    before = unsaveable(LazyConfig.load(str(file)))
    assert before == ["model.body._target_", "model.norm", "model._target_", "train.norms.0"]
    cfg = load_config(str(file), ["train.scale=5"])
    assert cfg.train.act is nn.ReLU and cfg.train.norms[1] == "BN"
    assert cfg.model.norm == {
        "file": str(file), "key": "model.norm", "_target_": value_of
    }  # fmt: skip
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cfg))
    model = instantiate(pickle.loads(pickle.dumps(load_config(str(saved)))).model)
    assert type(model).__name__ == "Net" and isinstance(model.norm, nn.LayerNorm)
    assert model.body.out_features == 15
    assert instantiate(load_config(str(saved)).train.norms[0])() == 1


def test_paths_and_numpy_scalars_become_text_and_numbers(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from pathlib import Path\nimport numpy as np\n"
        "train = dict(output_dir=Path('/data') / 'out', max_iter=np.int64(9), register=[])\n"
        "optimizer = dict(lr=np.float32(0.5), betas=[np.float64(0.5), 0.9], foreach=np.True_)\n"
    )
    cfg = load_config(str(file), ["optimizer.lr=0.25"])
    optimizer = {"lr": 0.25, "betas": [0.5, 0.9], "foreach": True}
    assert (cfg.train.output_dir, cfg.train.max_iter) == ("/data/out", 9)
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(cfg))
    for read in (cfg, load_config(str(saved))):
        assert read.optimizer == optimizer and type(read.optimizer.betas[0]) is float
        assert type(read.train.max_iter) is int and type(read.train.output_dir) is str


def test_a_config_that_registers_data_and_has_a_lambda(tmp_path):
    file = tmp_path / "own.py"
    file.write_text(
        "from detectron2.data import DatasetCatalog\n"
        "DatasetCatalog.register('of_a_config', lambda: [])\n"
        "train = dict(f=lambda: 1)\n"
    )
    cfg = load_config(str(file))
    assert instantiate(cfg.train.f)() == 1 and "of_a_config" in DatasetCatalog


def test_a_file_that_has_changed_is_named(tmp_path):
    file = tmp_path / "own.py"
    file.write_text("train = dict(f=lambda: 1)\n")
    assert value_of(str(file), "train.f")() == 1
    file.write_text("train = dict(g=lambda: 1)\n")
    with pytest.raises(UserError, match="own.py has no train.f any more"):
        value_of(str(file), "train.f")
    file.unlink()
    with pytest.raises(UserError, match="own.py is needed for the value of train.f"):
        value_of(str(file), "train.f")
