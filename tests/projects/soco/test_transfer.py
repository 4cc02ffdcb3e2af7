"""From a run's checkpoint into stock Detectron2, and runs that stop and go on."""

import subprocess
import sys
import textwrap

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from project_runs import check_stopped_run_resumes

from region_pretrain.config import CONFIG_ROOT, apply_overrides
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained

RECIPE = CONFIG_ROOT.parent / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"


@pytest.fixture
def run(region_folder, tmp_path):
    """``run(name, *overrides)``: a few steps of the Shapes recipe on the folder's images."""

    def start(name: str, *overrides: str, resume: bool = False):
        cfg = apply_overrides(
            LazyConfig.load(str(RECIPE)),
            [
                f"train.output_dir={tmp_path / name}",
                f"dataloader.train.dataset.names=folder://{region_folder.images}",
                f"dataloader.train.dataset.regions={region_folder.store}",
                "dataloader.train.dataset.recipe=shapes-v1",
                "dataloader.train.dataset.views.sizes=[32,32,16]",
                "dataloader.train.total_batch_size=4",
                "dataloader.train.num_workers=0",
                "train.max_iter=6",
                "train.log_period=1",
                "train.checkpointer.period=2",
                "train.hooks=[]",
                "train.device=cpu",
                *overrides,
            ],
        )
        do_pretrain(cfg, resume=resume)
        return tmp_path / name

    return start


def test_a_stopped_run_goes_on_bit_for_bit(run):
    check_stopped_run_resumes(run)


def test_stock_detectron2_fills_everything_that_was_trained(run):
    """A separate process that cannot import this project loads the file into the detector."""
    folder = run("stock")
    saved = torch.load(folder / "model_final.pth", weights_only=True)
    detector = get_detector()
    names = [n for n in saved["model"]]
    assert names and all(n.startswith(("backbone.", "roi_heads.box_head.")) for n in names)
    assert set(names) == {
        n for n in detector.state_dict() if n.startswith(("backbone.", "roi_heads.box_head."))
    }
    code = f"""
        import sys
        sys.modules["region_pretrain"] = None  # importing it fails
        import torch
        from detectron2 import model_zoo
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import LazyCall as L, instantiate
        from detectron2.layers import ShapeSpec
        from detectron2.modeling.backbone.resnet import BasicBlock, ResNet

        cfg = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
        cfg.backbone.bottom_up.stem.update(out_channels=24, norm="BN")
        cfg.backbone.bottom_up.stages = [
            L(ResNet.make_stage)(
                block_class=BasicBlock, num_blocks=2, stride_per_block=[stride, 1],
                in_channels=inputs, out_channels=outputs, norm="BN",
            )
            for inputs, outputs, stride in ((24, 24, 1), (24, 48, 2), (48, 96, 2), (96, 192, 2))
        ]
        cfg.backbone.norm = "BN"
        channels = {detector.backbone.output_shape()["p2"].channels}
        cfg.backbone.out_channels = cfg.proposal_generator.head.in_channels = channels
        head = cfg.roi_heads.box_head
        head.input_shape = ShapeSpec(channels=channels, height=7, width=7)
        head.conv_dims, head.conv_norm, head.fc_dims = [channels] * 4, "BN", [256]
        cfg.roi_heads.box_predictor.input_shape = ShapeSpec(channels=256)
        cfg.roi_heads.mask_head.input_shape = ShapeSpec(channels=channels, height=14, width=14)
        detector = instantiate(cfg)
        before = {{k: v.clone() for k, v in detector.state_dict().items()}}
        checkpointer = DetectionCheckpointer(detector)
        incompatible = []
        checkpointer._log_incompatible_keys = incompatible.append
        checkpointer.load({str(folder / "model_final.pth")!r})
        saved = torch.load({str(folder / "model_final.pth")!r}, weights_only=True)["model"]
        for name, value in detector.state_dict().items():
            if name in saved:
                assert torch.equal(value, saved[name]), name
            else:
                assert torch.equal(value, before[name]), name
        (keys,) = incompatible
        assert not keys.unexpected_keys and not keys.incorrect_shapes, keys
        new = {{key.split(".")[0] + "." + key.split(".")[1] for key in keys.missing_keys}}
        print(len(saved), sorted(new))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        f"{len(names)} ['proposal_generator.rpn_head', 'roi_heads.box_predictor', "
        "'roi_heads.mask_head']"
    )


def get_detector():
    cfg = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    return instantiate(cfg.model)


def test_the_account_of_a_transfer(run):
    folder = run("account")
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
