"""Checkpoints loaded into stock Detectron2, and runs that are stopped and resumed."""

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from project_runs import check_stopped_run_resumes, six_steps
from stock_detector import load_into_stock_detectron2

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained

RECIPE = CONFIG_ROOT.parent / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"


@pytest.fixture
def run(region_folder, tmp_path):
    """``run(name, *overrides)``: a few steps of the Shapes recipe on the folder's images."""

    def start(name: str, *overrides: str, resume: bool = False):
        cfg = six_steps(
            RECIPE,
            region_folder.images,
            tmp_path / name,
            f"dataloader.train.dataset.regions={region_folder.store}",
            "dataloader.train.dataset.recipe=shapes-v1",
            "dataloader.train.dataset.views.sizes=[32,32,16]",
            "train.hooks=[]",
            *overrides,
        )
        do_pretrain(cfg, resume=resume)
        return tmp_path / name

    return start


def test_a_resumed_run_is_bit_for_bit_the_same(run):
    check_stopped_run_resumes(run)


def test_stock_detectron2_fills_everything_that_was_trained(run):
    folder = run("stock")
    saved = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    detector = get_detector().state_dict()
    assert set(saved) == {n for n in detector if n.startswith(("backbone.", "roi_heads.box_head."))}
    (missing,) = load_into_stock_detectron2(folder / "model_final.pth")
    assert not set(missing) & set(saved)
    assert {".".join(name.split(".")[:2]) for name in missing} == {
        "proposal_generator.rpn_head",
        "roi_heads.box_predictor",
        "roi_heads.mask_head",
    }


def get_detector():
    cfg = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    return instantiate(cfg.model)


def test_report_of_a_transfer(run):
    folder = run("report")
    detector = get_detector()
    report = load_pretrained(detector, str(folder / "model_final.pth"))
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    assert sorted(report.matched) == sorted(saved["model"])
    state = detector.state_dict()
    assert all(torch.equal(state[n], v) for n, v in saved["model"].items())
    for key in ("optimizer", "scheduler", "pretraining", "rng", "iteration"):
        assert key in saved
    assert saved["iteration"] == 5
    assert any(n.startswith("target.backbone.") for n in saved["pretraining"])
