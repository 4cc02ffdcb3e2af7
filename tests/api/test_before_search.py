"""What ``pretrain`` and ``show_views`` refuse before the search for regions, which takes long."""

from __future__ import annotations

import pytest
import torch
from detectron2.config import instantiate
from narrow import SMALL, narrow_config

import region_pretrain as rp
from region_pretrain.api import pretraining


@pytest.fixture
def pretrain(region_folder, tmp_path, monkeypatch):
    """``rp.pretrain``, or another function, without regions: it fails if it searches for them."""

    def search(*args):
        raise AssertionError("searched for regions")

    monkeypatch.setattr(pretraining, "make_regions", search)

    def call(overrides=(), function=rp.pretrain, **changes):
        given = {"detector": narrow_config(), "steps": 4, "batch_size": 4, **changes}
        given |= {"images": region_folder.images, "output_dir": tmp_path / "a"}
        return function("soco", overrides=[*SMALL, *overrides], **given)

    return call


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 13}, "12 images, fewer than one batch: lower batch_size=13"),
        ({"init": "r5O.pth"}, "there is no r5O.pth: name the folder of a finished run"),
        ({"overrides": ["train.writers=[console,jso]"]}, "there is no writer 'jso'"),
        ({"overrides": ["train.device=gpu"]}, "train.device=gpu: must be cuda"),
        ({"overrides": ["train.accumulate_steps=5"]}, "train.accumulate_steps=5"),
        ({"steps": 0}, "train.max_iter=0: there is nothing to train"),
        ({"overrides": ["dataloader.train.dataset.views.sizes=[64]"]}, r"views.sizes=\[64\] must"),
        ({"overrides": ["model.projector.hidden=3"]}, "model.projector.hidden"),
        (
            {"steps": None, "epochs": 5, "overrides": ["lr_multiplier.warmup_epochs=10"]},
            "lr_multiplier.warmup_epochs=10 must be .* less than train.epochs=5",
        ),
    ],
)
def test_no_error_comes_after_the_search_for_regions(pretrain, tmp_path, changes, message):
    with pytest.raises(rp.UserError, match=message):
        pretrain(**changes)
    assert not (tmp_path / "a").exists()


def test_weights_of_another_architecture_are_refused_before_the_search(pretrain, tmp_path):
    weights = {"backbone.bottom_up.stem.conv1.weight": torch.zeros(5, 3, 7, 7)}
    torch.save({"model": weights}, tmp_path / "other.pth")
    with pytest.raises(rp.UserError, match="other.pth.*backbone.bottom_up.stem.conv1.weight"):
        pretrain(init=tmp_path / "other.pth")


def test_a_built_detector_is_as_before_when_the_search_begins(pretrain, tmp_path):
    torch.manual_seed(3)
    detector = instantiate(narrow_config().model).eval()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    weights = {name: value + 1 for name, value in before.items() if name.startswith("backbone")}
    torch.save({"model": weights}, tmp_path / "init.pth")
    with pytest.raises(AssertionError, match="searched for regions"):
        pretrain(detector=detector, init=tmp_path / "init.pth")
    for name, value in detector.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(p.requires_grad for p in detector.parameters()) and not detector.training


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "r5O.pth"}, "cannot read the checkpoint r5O.pth: no such file"),
        ({"overrides": ["dataloader.train.dataset.views.sizes=[64]"]}, r"views.sizes=\[64\] must"),
        ({"overrides": ["model.projector.hidden=3"]}, "model.projector.hidden"),
        ({"count": 13}, "count=13: there are 12 images"),
    ],
)
def test_pictures_are_refused_before_the_search(pretrain, tmp_path, changes, message):
    with pytest.raises(rp.UserError, match=message):
        pretrain(function=rp.show_views, **changes)
    assert not (tmp_path / "a").exists()


def test_pictures_need_no_complete_batch(pretrain):
    with pytest.raises(AssertionError, match="searched for regions"):
        pretrain(function=rp.show_views, count=12, batch_size=13)
