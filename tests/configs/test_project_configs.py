"""Every shipped pre-training recipe loads, survives save and load, and builds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate

from region_pretrain.config import CONFIG_ROOT, load_config

RECIPES = sorted((CONFIG_ROOT.parent / "projects").glob("*/configs/*.py"))


def test_there_are_recipes():
    assert len(RECIPES) >= 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_recipe(path: Path, tmp_path):
    cfg = LazyConfig.load(str(path))
    assert set(cfg.keys()) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    saved = str(tmp_path / "config.yaml")
    LazyConfig.save(cfg, saved)
    again = LazyConfig.load(saved)
    second = str(tmp_path / "second.yaml")
    LazyConfig.save(again, second)
    assert Path(second).read_text() == Path(saved).read_text()
    changed = load_config(saved, ["optimizer.lr=0.5", "train.max_iter=7"])
    assert changed.optimizer.lr == 0.5 and changed.train.max_iter == 7

    with torch.device("meta"):
        models = [instantiate(c.model) for c in (cfg, again)]
    states = [{k: v.shape for k, v in m.state_dict().items()} for m in models]
    assert states[0] == states[1] and len(states[0]) > 100
    assert all(hasattr(models[0], name) for name in models[0].detector_modules)
    multiplier, schedule = instantiate(again.lr_multiplier), again.lr_multiplier
    first = schedule.warmup_factor if schedule.warmup_epochs else 1
    assert multiplier(0.0) == pytest.approx(first)
    assert multiplier(1.0) == pytest.approx(schedule.final_factor) and multiplier(1.0) < 1e-4
    views = instantiate(again.dataloader.train.dataset.views)
    rng = np.random.default_rng(0)
    samples = views(640, 480, np.array([[50, 40, 300, 400]], np.float32), rng)
    assert [s.geometry.size for s in samples] == view_sizes(again.dataloader.train.dataset.views)
    assert len(samples[0].photometry.sample(rng)) == 11


def view_sizes(views) -> list[tuple[int, int]]:
    if "montage" in views:  # MCL: a full-size view a level, in two pyramids
        return [(views.montage.size,) * 2] * (2 * len(views.montage.ratios))
    partner = views.get("pairs", 0) > 0  # a third view, of point-level region contrast
    sizes = views.sizes if "sizes" in views else [views.size] * (2 + partner)
    return [(size, size) for size in sizes]


def test_sources_of_the_variants():
    sources = {
        p.stem: list(LazyConfig.load(str(p)).dataloader.train.dataset.views.sources)
        for p in RECIPES
        if p.stem.startswith("soco")
    }
    assert sources["soco-star_r50-fpn_16xb128-400ep_imagenet"] == ["crop", "crop", 0]
    assert sources["soco_r50-c4_16xb128-400ep_imagenet"] == ["crop"]
    assert sources["soco_r50-fpn_16xb128-530ep_coco"] == ["crop", "crop"]


@pytest.mark.parametrize(
    ("name", "epochs", "batch", "lr", "iterations"),
    [
        ("soco_r50-fpn_16xb128-530ep_coco", 530, 2048, 8.0, 62_540),
        ("soco_r50-fpn_16xb128-100ep_imagenet", 100, 2048, 8.0, 62_500),
        ("soco_r50-fpn_16xb128-400ep_imagenet", 400, 2048, 8.0, 250_000),
        ("soco_r50-fpn_8xb128-100ep_imagenet", 100, 1024, 4.0, 125_100),
        ("soco-star_r50-fpn_16xb128-400ep_imagenet", 400, 2048, 8.0, 250_000),
        ("soco_r50-c4_16xb128-100ep_imagenet", 100, 2048, 8.0, 62_500),
    ],
)
def test_facts_of_the_recipes(name, epochs, batch, lr, iterations):
    cfg = LazyConfig.load(str(CONFIG_ROOT.parent / f"projects/SoCo/configs/{name}.py"))
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == lr
    images = 241_690 if "coco" in name else 1_281_167
    assert images // batch * epochs == iterations
    assert lr * cfg.lr_multiplier.final_factor == pytest.approx(1e-6)
    assert cfg.optimizer.params.weight_decay == 1e-5 and cfg.lr_multiplier.warmup_epochs == 10
    assert cfg.model.momentum.start == 0.99
    views = cfg.dataloader.train.dataset.views
    assert views.num_regions == 4
    first, other = views.first_photometry, views.other_photometry
    for photometry in (first, other):
        assert (photometry.brightness, photometry.contrast) == (0.4, 0.4)
        assert (photometry.saturation, photometry.hue) == (0.2, 0.1)
        assert (photometry.jitter_prob, photometry.gray_prob) == (0.8, 0.2)
        assert tuple(photometry.blur_sigma) == (0.1, 2.0)
    assert (first.blur_prob, other.blur_prob, other.solarize_prob) == (1.0, 0.1, 0.2)
    assert "solarize_prob" not in first
    if "c4" in name:
        assert tuple(views.crop_area) == (0.6, 1.0) and views.jitter_prob == 0
    else:
        assert tuple(views.crop_area) == (0.5, 1.0)
        assert (views.jitter_prob, views.jitter_ratio) == (0.5, 0.1)
        assert list(cfg.model.level_scales) == [48, 96, 192, 224]
    assert list(views.sizes) == {
        "soco-star": [224, 224, 192, 112],
        "soco_r50-c4": [224, 224],
    }.get(name.split("_16x")[0].removesuffix("_r50-fpn"), [224, 224, 112])


@pytest.mark.parametrize(
    ("name", "batch", "lr", "iterations"),
    [
        ("mcl_r50-fpn_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
        ("mcl_r50-fpn_8xb128-100ep_imagenet", 1024, 4.0, 125_100),
        ("mcl_r50-fpn_32xb128-530ep_coco", 4096, 16.0, 31_270),
        ("mcl_r50_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
        ("mcl-supervised_r50-fpn_32xb128-100ep_imagenet", 4096, 16.0, 31_200),
    ],
)
def test_facts_of_mcls_recipes(name, batch, lr, iterations):
    cfg = LazyConfig.load(str(CONFIG_ROOT.parent / f"projects/MCL/configs/{name}.py"))
    assert cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == lr
    images = 241_690 if "coco" in name else 1_281_167
    per_epoch = images // batch
    assert per_epoch * cfg.train.epochs == iterations
    # 10 epochs of ImageNet are 3,120 steps of 4096; the release has 3,127 of 31,200.
    warmup = cfg.lr_multiplier.warmup_epochs * per_epoch * batch / 4096
    assert warmup == pytest.approx(3_127, rel=5e-3)
    assert lr * cfg.lr_multiplier.final_factor == pytest.approx(1e-4)
    assert lr * cfg.lr_multiplier.warmup_factor == pytest.approx(1e-4 * lr)
    assert (cfg.optimizer.momentum, cfg.optimizer.trust_coefficient) == (0.9, 0.001)
    assert cfg.optimizer.params.weight_decay == 1e-5 and cfg.optimizer.form == "original"
    assert not cfg.optimizer.params.released_exclusions
    assert cfg.train.clip_grad.enabled and cfg.train.clip_grad.max_norm == 500
    model, views = cfg.model, cfg.dataloader.train.dataset.views
    assert list(model.level_weights) == [1 / 2, 1 / 4, 1 / 8, 1 / 8]
    if "supervised" not in name:
        assert (model.temperature, model.pairing, model.momentum.start) == (1.0, "top", 0.99)
    assert model.compute == "windows" and list(model.head.fc_dims) == []
    montage = views.montage
    assert (montage.size, montage.shrink) == (224, "nearest")
    assert list(montage.ratios) == [1, 2, 4, 8]
    assert list(montage.images_per_canvas) == [1, 4, 16, 32]
    assert tuple(views.crop_area) == (0.2, 1.0)
    query, key = views.query_photometry, views.key_photometry
    assert (query.blur_prob, key.blur_prob, key.solarize_prob) == (1.0, 0.1, 0.2)
    assert "solarize_prob" not in query
    for photometry in (query, key):
        assert (photometry.brightness, photometry.contrast) == (0.4, 0.4)
        assert (photometry.saturation, photometry.hue) == (0.2, 0.1)
        assert (photometry.jitter_prob, photometry.gray_prob) == (0.8, 0.2)
        assert tuple(photometry.blur_sigma) == (0.1, 2.0)
