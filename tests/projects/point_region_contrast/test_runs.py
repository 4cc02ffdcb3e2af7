"""Complete runs: resuming, loading into stock Detectron2, pictures; and values of the recipes."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from project_runs import check_stopped_run_resumes, losses, six_steps

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.reporting.boxes import _LABEL_WIDTH
from region_pretrain.reporting.pictures import first_views, model_pictures, pictures

CONFIGS = CONFIG_ROOT.parent / "projects/PointRegionContrast/configs"
VIEWS = "dataloader.train.dataset.views"


@pytest.fixture
def config(noise_folder, tmp_path):
    """``config(name, *overrides)``: the Shapes recipe on a folder, six steps."""

    def make(name: str, *overrides: str):
        return six_steps(
            CONFIGS / "point-region_r18-fpn_b32_shapes.py",
            noise_folder,
            tmp_path / name,
            f"{VIEWS}.size=32",
            f"{VIEWS}.cells=8",
            f"{VIEWS}.pairs=16",
            "model.queue.length=32",
            "model.affinity_head.prototypes=8",
            *overrides,
        )

    return make


@pytest.mark.parametrize("micro_batches", [1, 2])
def test_a_stopped_run_resumes_bit_for_bit(config, tmp_path, micro_batches):
    def run(name: str, resume: bool = False):
        # Everything that has state: two queues, the prototypes' center, maps of the pixels.
        extra = (
            "model.contrast.others=queue",
            "model.contrast.queue_length=50",
            f"{VIEWS}.maps.kind=kmeans",
            f"train.accumulate_steps={micro_batches}",
        )
        do_pretrain(config(name, *extra), resume=resume)
        return tmp_path / name

    check_stopped_run_resumes(run)
    saved = torch.load(tmp_path / "whole/model_final.pth", weights_only=True)["pretraining"]
    assert {"queue.keys", "contrast.queue.pointer", "distillation.center"} <= set(saved)


def test_mixed_precision_micro_batches_and_the_detector(config, tmp_path):
    do_pretrain(config("a", "train.amp.enabled=True", "train.accumulate_steps=2"))
    assert (
        len(losses(tmp_path / "a")) == 6
        and np.isfinite(list(losses(tmp_path / "a").values())).all()
    )
    path = str(tmp_path / "a/model_final.pth")
    assert torch.load(path, weights_only=True)["pretraining"]["queue.pointer"] == 24
    cfg = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    report = load_pretrained(instantiate(cfg.model), path)
    full = {n for n, c in report.modules.items() if c.loaded_tensors == c.tensors}
    assert full == {"backbone.bottom_up", "backbone.fpn"} and not report.unexpected


def test_all_trunk_tensors_match_in_stock_detectors(tmp_path):
    """A process that cannot import this project counts the matching tensors of a ResNet-50."""
    files = {}
    for name in ("r50_8xb32-100ep", "r50-c4_8xb32-200ep"):
        cfg = LazyConfig.load(str(CONFIGS / f"point-region_{name}_imagenet.py"))
        cfg.model.queue.length = 8
        cfg.model.momentum = None
        files[name] = str(tmp_path / f"{name}.pth")
        torch.save({"model": split_state(instantiate(cfg.model))[0]}, files[name])
    code = f"""
        import sys
        sys.modules["region_pretrain"] = None  # importing it fails
        import torch
        from detectron2 import model_zoo
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import instantiate

        for name, path in {list(files.items())!r}:
            kind = "c4" if "c4" in name else "fpn"
            cfg = model_zoo.get_config(f"common/models/mask_rcnn_{{kind}}.py").model
            trunk = cfg.backbone if kind == "c4" else cfg.backbone.bottom_up
            trunk.stem.norm = trunk.stages.norm = "BN"
            if kind == "c4":
                cfg.roi_heads.res5.norm = "BN"
            detector = torch.nn.Module()
            detector.backbone = instantiate(cfg.backbone)
            detector.roi_heads = torch.nn.Module()
            if kind == "c4":
                detector.roi_heads.res5 = torch.nn.Sequential(*instantiate(cfg.roi_heads.res5))
            checkpointer = DetectionCheckpointer(detector)
            incompatible = []
            checkpointer._log_incompatible_keys = incompatible.append
            checkpointer.load(path)
            saved = torch.load(path, weights_only=True)["model"]
            state = detector.state_dict()
            matched = [n for n in state if n in saved and torch.equal(state[n], saved[n])]
            count = len([n for n in matched if not n.endswith("num_batches_tracked")])
            (keys,) = incompatible
            assert not keys.incorrect_shapes, keys
            left = sorted({{n.rsplit(".", 1)[0] for n in keys.unexpected_keys}})
            print(count, len([n for n in matched if n.endswith("weight")]), left)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # 53 convolutions and as many norms of 4 tensors. The C4 detector has one more norm than stock.
    assert done.stdout.splitlines() == ["265 106 []", "265 106 ['roi_heads.res5.norm']"]


def test_pictures(config):
    cfg = config("drawn")
    batch = first_views(cfg, 3)
    rows = pictures(cfg, batch)
    side = 32 * -(-_LABEL_WIDTH // 32)
    assert [len(row) for row in rows] == [4] * 3
    assert all(picture.shape == (side, side, 3) for row in rows for picture in row)
    affinities = model_pictures(cfg, batch)
    assert [len(row) for row in affinities] == [3] * 3
    cyan = (0, 235, 235)
    assert all((row[0] == cyan).all(axis=2).sum() > 20 for row in affinities)  # the point
    assert all((row[1] != row[2]).any() for row in affinities)
    batch.views[2].valid.zero_()
    assert not any((row[0] == cyan).all(axis=2).any() for row in model_pictures(cfg, batch))
    with pytest.raises(UserError, match="leaves no affinities to draw"):
        model_pictures(config("none", "model.affinity_weight=0"), batch)
    with pytest.raises(UserError, match="kind='supergrid'.*did you mean grid"):
        first_views(config("none", f"{VIEWS}.maps.kind=supergrid"), 3)


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "iterations"),
    [
        ("r50_8xb32-100ep_imagenet", 100, 0.03, 500_400),
        ("r50_8xb32-200ep_imagenet", 200, 0.03, 1_000_800),
        ("r50-c4_8xb32-200ep_imagenet", 200, 0.03, 1_000_800),
        ("r50-fpn_8xb32-200ep_imagenet", 200, 0.03, 1_000_800),
        ("r50_8xb32-800ep_coco", 800, 0.3, 369_600),
    ],
)
def test_values_of_the_recipes(name, epochs, lr, iterations):
    cfg = LazyConfig.load(str(CONFIGS / f"point-region_{name}.py"))
    batch = cfg.dataloader.train.total_batch_size
    assert (cfg.train.epochs, batch, cfg.optimizer.lr) == (epochs, 8 * 32, lr)
    images = 118_287 if "coco" in name else 1_281_167
    assert images // batch * epochs == iterations and cfg.train.base_batch_size == 256
    assert (cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.9, 1e-4)
    assert cfg.optimizer.params.weight_decay_norm is None and not cfg.train.amp.enabled
    multiplier = instantiate(cfg.lr_multiplier)
    rates = [0.03 * multiplier(epoch / 100) for epoch in (0, 1, 50, 99)]
    assert rates == pytest.approx([0.03, 0.0299926, 0.015, 7.4e-6], rel=1e-3)
    model, views = cfg.model, cfg.dataloader.train.dataset.views
    assert [model[f"{n}_weight"] for n in ("image", "point", "affinity")] == [0.7, 0.3, 0.3]
    assert (model.queue.length, model.queue.dim, model.temperature) == (65_536, 128, 0.2)
    assert instantiate(model.momentum)(0.5) == 0.999 and model.shuffle
    assert (model.contrast.temperature, model.contrast.pool) == (0.2, 1)
    assert (model.contrast.in_image, model.contrast.others) == (True, "local")
    assert model.distillation.student_temperature == 0.1 and model.distillation.cells == 56
    assert tuple(model.distillation.teacher_temperature) == (0.04, 0.07)
    assert model.distillation.warmup == 0.3 and model.distillation.prototypes == 0
    assert (views.size, views.points, views.num_regions, views.pairs) == (224, 16, 16, 256)
    assert (views.min_overlap, views.max_draws, views.positives) == (0.5, 101, "region")
    assert instantiate(views.maps).n == 4 and tuple(views.crop_area) == (0.2, 1.0)
    light = views.photometry
    assert (light.brightness, light.contrast, light.saturation, light.hue) == (0.4, 0.4, 0.4, 0.1)
    assert (light.jitter_prob, light.gray_prob, light.blur_prob) == (0.8, 0.2, 0.5)
    with torch.device("meta"):
        heads = [instantiate(model[n]) for n in ("head", "affinity_head")]
    assert [heads[0][0].out_features, heads[0][-1].out_features] == [2048, 128]
    linear = [m for m in heads[1].modules() if isinstance(m, torch.nn.Linear)]
    assert [m.out_features for m in linear] == [2048, 2048, 256]
