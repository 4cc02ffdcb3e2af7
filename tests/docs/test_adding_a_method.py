"""The method of docs/adding_a_method.md: written to files, trained, loaded into the detector."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling import META_ARCH_REGISTRY

import region_pretrain.projects
from region_pretrain.config import get_config
from region_pretrain.data.views import ViewSampler
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.overrides import apply_overrides

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/adding_a_method.md").read_text(encoding="utf-8")
#: The page's code by the path in the first line of each block.
FILES = dict(re.findall(r"```python\n# (\S+)\n(.+?)```", PAGE, re.DOTALL))
PACKAGE = "region_pretrain.projects.region_byol"
CONFIG = "projects/RegionBYOL/configs/region-byol_r18-fpn_b32_shapes.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder with the page's files, whose project can be imported as in a checkout."""
    root = tmp_path_factory.mktemp("checkout")
    for name, text in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    region_pretrain.projects.__path__.append(str(root / "projects/RegionBYOL"))
    yield root
    region_pretrain.projects.__path__.remove(str(root / "projects/RegionBYOL"))
    for module in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[module]
    META_ARCH_REGISTRY._obj_map.pop("RegionBYOL", None)


@pytest.fixture
def pretrain(checkout, region_folder, tmp_path):
    """``pretrain(name, *overrides)``: the page's config on a few images; returns the folder."""

    def run(name: str, *overrides: str) -> Path:
        cfg = apply_overrides(
            LazyConfig.load(str(checkout / CONFIG)),
            [
                f"train.output_dir={tmp_path / name}",
                f"dataloader.train.dataset.names=folder://{region_folder.images}",
                f"dataloader.train.dataset.regions={region_folder.store}",
                "dataloader.train.total_batch_size=4",
                "dataloader.train.num_workers=0",
                "train.device=cpu",
                "train.log_period=1",
                "train.checkpointer.period=1",
                "train.checkpointer.max_to_keep=null",
                *overrides,
            ],
        )
        do_pretrain(cfg)
        return tmp_path / name

    return run


def load(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(path, weights_only=True)


def online_and_target(saved: dict) -> tuple[dict, dict]:
    """Parameters of the online and the target network, both by the target's names."""
    target = {
        name.removeprefix("target."): value
        for name, value in saved["pretraining"].items()
        if name.startswith("target.") and name.endswith(("weight", "bias"))
    }
    entries = {**saved["model"], **saved["pretraining"]}
    return {name: entries[re.sub("^head", "roi_heads.box_head", name)] for name in target}, target


def test_losses_are_finite_and_the_target_is_the_moving_average(pretrain, checkout):
    folder = pretrain("run", "train.max_iter=4")
    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    losses = [line["loss_region"] for line in lines if "loss_region" in line]
    assert len(losses) == len(set(losses)) == 4 and np.isfinite(losses).all()
    momentum = instantiate(LazyConfig.load(str(checkout / CONFIG)).model.momentum)
    files = [f"model_{i:07d}.pth" for i in range(3)] + ["model_final.pth"]
    steps = [online_and_target(load(folder / name)) for name in files]
    for i in (1, 2, 3):
        (online, before), (_, after) = steps[i - 1], steps[i]
        m = momentum(i / 4)
        for name, value in after.items():
            expected = m * before[name] + (1 - m) * online[name]
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-7)
        assert any(not torch.equal(value, before[name]) for name, value in after.items())


def test_the_target_of_an_initialised_run_equals_the_loaded_weights(pretrain):
    first = pretrain("first", "train.max_iter=3")
    init = f"train.init_checkpoint={first / 'model_final.pth'}"
    # At iteration 0 the target is averaged with the online network, which it must equal.
    second = pretrain("second", "train.max_iter=1", init)
    loaded = load(first / "model_final.pth")["model"]
    target = load(second / "model_final.pth")["pretraining"]
    checked = 0
    for name, value in loaded.items():
        if name.endswith(("weight", "bias")):
            copy = f"target.{re.sub('^roi_heads.box_head', 'head', name)}"
            assert torch.equal(target[copy], value), name
            checked += 1
    assert checked > 60


def test_the_checkpoint_has_the_detectors_entries_and_loads_into_it(pretrain):
    path = pretrain("run", "train.max_iter=1") / "model_final.pth"
    saved = load(path)["model"]
    detector = instantiate(get_config("detection/mask_rcnn_r18_fpn_shapes.py").model)
    shapes = {
        name: value.shape
        for name, value in detector.state_dict().items()
        if name.startswith(("backbone.", "roi_heads.box_head."))
    }
    assert {name: value.shape for name, value in saved.items()} == shapes
    checkpointer, incompatible = DetectionCheckpointer(detector), []
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(path))
    (keys,) = incompatible
    assert not keys.unexpected_keys and not keys.incorrect_shapes
    assert not set(keys.missing_keys) & set(saved)
    state = detector.state_dict()
    assert all(torch.equal(state[name], value) for name, value in saved.items())


OWN = """
import sys
from region_pretrain.config import load_config
from region_pretrain.engine.build import build_pretraining_model
from region_pretrain.engine.methods import load_method
from region_pretrain.errors import UserError
import torch
detector = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
recipe = load_method(sys.argv[1], detector)
config = load_config(sys.argv[2])
for cfg in (recipe, config):
    model = build_pretraining_model(cfg, torch.device("cpu"))
    print(type(model).__module__)
for other in ("retinanet_r50_fpn", "faster_rcnn_r50_c4_voc"):
    try:
        load_method(sys.argv[1], f"configs/detection/{other}.py")
    except UserError as error:
        print(error)
"""


def test_in_a_package_of_your_own(tmp_path):
    """The page's files outside of the repository, found on ``PYTHONPATH``."""
    for name, text in FILES.items():
        own = name.replace(CONFIG, "mine/region_byol_shapes.py")
        own = tmp_path / own.replace("projects/RegionBYOL/region_byol/", "mine/region_byol/")
        own.parent.mkdir(parents=True, exist_ok=True)
        own.write_text(text.replace(PACKAGE, "region_byol"), encoding="utf-8")
    files = [str(tmp_path / f"mine/region_byol_{name}.py") for name in ("recipe", "shapes")]
    path = os.pathsep.join([str(tmp_path / "mine"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", OWN, *files],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    *built, retinanet, c4 = done.stdout.splitlines()
    assert built == ["region_byol.meta_arch"] * 2
    for refused in (retinanet, c4):  # towers and res5 are heads of another kind
        assert refused.endswith("RegionBYOL trains a box head, and the detector has none")


def test_the_pages_own_tests_pass(checkout):
    path = "tests/projects/region_byol/test_region_byol.py"
    namespace = {"__name__": "test_region_byol"}
    exec(compile(FILES[path], path, "exec"), namespace)
    tests = [value for name, value in namespace.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_page_counts_its_lines():
    table = re.findall(r"^\| `(\S+)` \| (\d+) \|$", PAGE, re.MULTILINE)
    counted = {name: len(text.splitlines()) for name, text in FILES.items()}
    assert len(table) == len(counted)
    for name, lines in table:
        (path,) = [path for path in counted if path.endswith(name)]
        assert counted[path] == int(lines), name


def test_hooks_on_the_page_are_the_contracts():
    for base in (PretrainingModel, ViewSampler):
        section = PAGE.split(f"`{base.__module__}.{base.__name__}`")[1].split("\n\n")[1]
        named = dict(re.findall(r"^\| `(\w+)\((.*?)\)`", section, re.MULTILINE))
        for name, arguments in named.items():
            assert list(base._hooks[name].parameters) == [
                "self",
                *re.findall(r"\w+", arguments),
            ]
        assert len(named) >= 3
