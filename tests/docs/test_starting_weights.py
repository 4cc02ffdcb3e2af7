"""The recipe of continued pre-training: its overrides fit the methods' configs, and they train."""

import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate

from region_pretrain.config import CONFIG_ROOT, load_config
from region_pretrain.engine.pretrain import do_pretrain

ROOT = CONFIG_ROOT.parent
#: Row of the table -> the config that it is for, and the method's config for Shapes.
CONFIGS = {
    "SoCo": ("SoCo", "soco_r50-fpn_8xb128-100ep_imagenet", "soco_r18-fpn_b32_shapes"),
    "MCL": ("MCL", "mcl_r50-fpn_8xb128-100ep_imagenet", "mcl_r18-fpn_b32_shapes"),
    "BYOL": ("BYOL", "byol_r50_32xb128-100ep_imagenet", "byol_r18_b32_shapes"),
    "CCOP": ("CCOP", "ccop_r50-fpn_8xb32-800ep_coco", "ccop_r18-fpn_b32_shapes"),
    "MoCo v2": ("MoCo", "moco-v2_r50_8xb32-200ep_imagenet", "moco-v2_r18_b32_shapes"),
    "point-level": (
        "PointRegionContrast",
        "point-region_r50-fpn_8xb32-200ep_imagenet",
        "point-region_r18-fpn_b32_shapes",
    ),
}


def config(method: str, shapes: bool, overrides: list[str]):
    folder, full, small = CONFIGS[method]
    path = ROOT / "projects" / folder / "configs" / f"{small if shapes else full}.py"
    return load_config(str(path), overrides)


def rows() -> dict[str, tuple[str, list[str]]]:
    """Method -> its published values, and the overrides of its continued pre-training."""
    lines = (ROOT / "docs/starting_weights.md").read_text().splitlines()
    first = lines.index("| method | published | continued |") + 2
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in lines[first : first + 7]
    ]
    values = {method: (text, code.strip("`").split()) for method, text, code in cells}
    common = values.pop("all")[1]
    return {method: (text, [*common, *own]) for method, (text, own) in values.items()}


def test_every_method_has_a_row():
    assert [*rows()] == [*CONFIGS]
    assert {folder for folder, _, _ in CONFIGS.values()} == {
        path.parent.parent.name for path in ROOT.glob("projects/*/configs/*_shapes.py")
    }


@pytest.mark.parametrize("method", CONFIGS)
def test_published_values_and_their_reduction(method):
    published, overrides = rows()[method]
    before, after = config(method, False, []), config(method, False, overrides)
    name = "LARS" if "LARS" in str(before.optimizer._target_) else "SGD"
    epochs = before.lr_multiplier.warmup_epochs
    warmup = f"warm-up {epochs} of {before.train.epochs} epochs" if epochs else "no warm-up"
    assert published == f"{name} {before.optimizer.lr}, {warmup}"
    factor = {"LARS": 5, "SGD": 3}[name]
    assert after.optimizer.lr == pytest.approx(before.optimizer.lr / factor)
    assert (after.train.epochs, after.lr_multiplier.warmup_epochs) == (100, 5)
    multiplier = instantiate(after.lr_multiplier)
    assert multiplier(0.0) <= 0.01 and multiplier(0.05) == pytest.approx(1, rel=0.01)
    if "start" in after.model.momentum:
        assert after.model.momentum.start == 0.99
    else:
        queue = after.model.get("image_queue", after.model.get("queue")).length
        steps_in_queue = queue / after.dataloader.train.total_batch_size
        assert 1 / (1 - after.model.momentum.value) > 5 * steps_in_queue


@pytest.fixture
def start(tmp_path, region_folder):
    """Overrides of a tiny run, and a SoCo checkpoint from one."""
    tiny = [
        f"dataloader.train.dataset.names=folder://{region_folder.images}",
        "dataloader.train.total_batch_size=4",
        "dataloader.train.num_workers=0",
        "train.device=cpu",
        "train.log_period=1",
        "train.checkpointer.period=0",
    ]
    regions = [
        f"dataloader.train.dataset.regions={region_folder.store}",
        "dataloader.train.dataset.recipe=shapes-v1",
    ]
    folder = tmp_path / "start"
    changes = [*tiny, *regions, "train.max_iter=1", f"train.output_dir={folder}"]
    do_pretrain(config("SoCo", True, changes))
    return tiny, regions, folder / "model_final.pth"


@pytest.mark.parametrize("method", CONFIGS)
def test_the_overrides_train(method, start, tmp_path):
    tiny, regions, weights = start
    overrides = rows()[method][1]
    folder = tmp_path / "run"
    changes = [*overrides, *tiny, *(regions if method in ("SoCo", "CCOP") else [])]
    changes += [f"train.init_checkpoint={weights}", f"train.output_dir={folder}"]
    cfg = config(method, True, [*changes, "train.max_iter=4"])
    do_pretrain(cfg)
    lines = [json.loads(line) for line in Path(folder / "metrics.json").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 3]
    assert all(math.isfinite(line["total_loss"]) for line in lines)
    multiplier = instantiate(cfg.lr_multiplier)
    rates = [cfg.optimizer.lr * 4 / 256 * multiplier(i / 4) for i in range(4)]
    assert [line["lr"] for line in lines] == pytest.approx(rates)
    files = (weights, folder / "model_final.pth")
    before, after = (torch.load(file, weights_only=True)["model"] for file in files)
    convolutions = [name for name, value in after.items() if "res5" in name and value.ndim == 4]
    assert len(convolutions) == 5
    for name in convolutions:
        old, new = before[name].double(), after[name].double()
        assert 0 < (new - old).norm() < 0.1 * old.norm(), name
