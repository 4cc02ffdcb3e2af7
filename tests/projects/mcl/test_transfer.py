"""Checkpoints loaded into stock Detectron2, and runs that are stopped and resumed."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from project_runs import check_stopped_run_resumes, losses, six_steps
from stock_detector import load_into_stock_detectron2

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.data.shapes import shapes
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.projects.mcl.objects import object_crops

RECIPES = CONFIG_ROOT.parent / "projects/MCL/configs"
SHAPES = "mcl_r18-fpn_b32_shapes"


@pytest.fixture
def run(region_folder, tmp_path):
    """``run(name, *overrides)``: a few steps of a Shapes recipe on the folder's images."""

    def start(name: str, *overrides: str, recipe: str = SHAPES, resume: bool = False):
        cfg = six_steps(
            RECIPES / f"{recipe}.py",
            region_folder.images,
            tmp_path / name,
            "dataloader.train.dataset.views.montage.size=56",  # on P3 and P2
            "dataloader.train.dataset.views.montage.ratios=[1,2]",
            "dataloader.train.dataset.views.montage.images_per_canvas=[1,4]",
            "model.level_weights=[0.5,0.5]",
            *overrides,
        )
        do_pretrain(cfg, resume=resume)
        return tmp_path / name

    return start


def test_a_resumed_run_is_bit_for_bit_the_same(run):
    check_stopped_run_resumes(run)


def get_detector():
    return instantiate(
        LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py")).model
    )


def test_stock_detectron2_fills_everything_that_was_trained(run):
    """The recipe fills backbone, FPN and the head's convolutions; with fc the complete head."""
    folders = [
        run("plain", "train.max_iter=2"),
        run("fc", "train.max_iter=2", "model.head.fc_dims=[256]", "model.projector.input_dim=256"),
    ]
    names = [
        n for n in get_detector().state_dict() if n.startswith(("backbone.", "roi_heads.box_head."))
    ]
    convs = [n for n in names if "box_head.fc" not in n]
    for folder, expected in zip(folders, (convs, names), strict=True):
        assert set(torch.load(folder / "model_final.pth", weights_only=True)["model"]) == set(
            expected
        )
    missing = load_into_stock_detectron2(*(folder / "model_final.pth" for folder in folders))
    fc = ["roi_heads.box_head.fc1.weight", "roi_heads.box_head.fc1.bias"]
    assert [n for n in names if n in missing[0]] == fc
    assert not set(missing[1]) & set(names)

    detector = get_detector()
    report = load_pretrained(detector, str(folders[0] / "model_final.pth"))
    assert sorted(report.matched) == sorted(convs)
    saved = torch.load(folders[0] / "model_final.pth", weights_only=True)
    assert any(n.startswith("target.backbone.") for n in saved["pretraining"])
    assert saved["pretraining"]["shrink_filter"] == 0


def test_the_supervised_recipe_trains_on_folders_of_classes(run, region_folder):
    arguments = ("train.max_iter=2", "dataloader.train.dataset.labels=True")
    recipe = dict(recipe="mcl-supervised_r18-fpn_b32_shapes")
    with pytest.raises(UserError, match="it is not in a class folder"):
        run("unlabeled", *arguments, **recipe)
    (region_folder.images / "other").mkdir()
    for path in sorted(region_folder.images.glob("*.png")):
        path.rename(region_folder.images / "other" / path.name)  # next to "sub"
    folder = run("folder", *arguments, **recipe)
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    detector = get_detector()
    report = load_pretrained(detector, str(folder / "model_final.pth"))
    assert sorted(report.matched) == sorted(saved["model"])
    assert {n for n in saved["pretraining"] if "classifier" in n} == {
        "classifier.weight",
        "classifier.bias",
    }
    assert "accuracy_p3" in (folder / "metrics.json").read_text()


def test_the_supervised_recipe_trains_on_objects_of_shapes(run, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    names = object_crops(shapes(split="train", size=12, side=64))
    folder = run(
        "shapes",
        "train.max_iter=2",
        f"dataloader.train.dataset.names={names}",
        recipe="mcl-supervised_r18-fpn_b32_shapes",
    )
    assert set(losses(folder)) == {0, 1}
