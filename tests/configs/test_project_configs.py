"""Every shipped pre-training recipe loads, survives save and load, and builds.

Only what holds for any project; the facts of a project's recipes are in ``tests/projects``.
"""

from pathlib import Path

import numpy as np
import pytest
from detectron2.config import LazyConfig, instantiate

from region_pretrain.config import CONFIG_ROOT, load_config
from region_pretrain.data.photometry import PhotometryLayout
from region_pretrain.data.views import ViewSampler
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.meta_arch import check_contract

RECIPES = sorted((CONFIG_ROOT.parent / "projects").glob("*/configs/*.py"))


def test_each_project_has_recipes():
    projects = {p.parent.parent for p in RECIPES}
    assert projects == {p.parent for p in (CONFIG_ROOT.parent / "projects").glob("*/README.md")}
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

    with on_meta_device():
        models = [instantiate(c.model) for c in (cfg, again)]
    states = [{k: v.shape for k, v in m.state_dict().items()} for m in models]
    assert states[0] == states[1] and len(states[0]) > 100
    model = check_contract(models[0])
    cfg.optimizer.params.model = model
    grouped = [p for group in instantiate(cfg.optimizer).param_groups for p in group["params"]]
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(grouped) == len(trained) and set(grouped) == set(trained)
    multiplier = instantiate(again.lr_multiplier)
    assert all(0 <= multiplier(i / 100) <= 1 for i in range(101))


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_views_of_a_recipe(path: Path):
    """Shapes never change, and the generator is the only source of randomness."""
    views = instantiate(LazyConfig.load(str(path)).dataloader.train.dataset.views)
    assert isinstance(views, ViewSampler)
    boxes = np.array([[50, 40, 300, 400]], np.float32)

    def draw(width: int, height: int, regions: np.ndarray):
        rng = np.random.default_rng(0)
        samples = views(width, height, regions, rng)
        assert len(samples[0].photometry.sample(rng)) == len(PhotometryLayout)
        return samples

    first, again, other = (
        draw(640, 480, boxes), draw(640, 480, boxes), draw(320, 500, boxes[:0])
    )  # fmt: skip
    assert [v.geometry for v in first] == [v.geometry for v in again]
    for a, b in zip(first, other, strict=True):
        assert a.geometry.size == b.geometry.size
        assert a.boxes.shape == b.boxes.shape == (*a.region_ids.shape, 4)
        assert a.valid.shape == b.valid.shape == a.region_ids.shape
