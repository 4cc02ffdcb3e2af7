"""Layers that would stay random are found before a run starts."""

from __future__ import annotations

import logging

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from narrow_detector import build, detector_config, save, state
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.engine.trainable import check_trainable
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.given import as_lazy_detector
from region_pretrain.modeling.meta_arch import PretrainingModel
from region_pretrain.modeling.timm_backbone import TimmBackbone


class Pretraining(PretrainingModel):
    detector_modules = ("backbone",)

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, batch):
        return {}


def frozen() -> tuple[OmegaConf, Pretraining]:
    detector = detector_config(norm="FrozenBN")
    detector.backbone.bottom_up.freeze_at = 2
    cfg = OmegaConf.create({"model": detector}, flags={"allow_objects": True})
    return cfg, Pretraining(instantiate(detector.backbone))


def test_frozen_layers_need_weights(tmp_path):
    cfg, model = frozen()
    with pytest.raises(UserError) as error:
        check_trainable(cfg, model)
    text = str(error.value)
    # stem and res2: 3 convolutions; 11 convolutions of the trunk and 8 of the FPN have a norm
    assert "3 parameters, e.g. backbone.bottom_up.stem.conv1.weight" in text
    assert "19 batch norms, e.g. backbone." in text
    assert "model.backbone.bottom_up.freeze_at=0" in text
    assert "model.backbone.norm=SyncBN" in text

    path = save(tmp_path, {"model": state(instantiate(cfg.model), "backbone.")})
    check_trainable(cfg, model, load_pretrained(model, path).matched)


def test_weights_of_the_trunk_do_not_fill_the_fpns_norms(tmp_path):
    cfg, model = frozen()
    path = save(tmp_path, {"model": state(instantiate(cfg.model), "backbone.bottom_up")})
    with pytest.raises(
        UserError, match=r"8 batch norms, e.g. backbone.fpn_lateral2.norm\)"
    ) as error:
        check_trainable(cfg, model, load_pretrained(model, path).matched)
    assert "parameters" not in str(error.value)


def test_statistics_of_a_file_do_not_hide_what_it_lacks(tmp_path):
    """Those of a trained trunk, which are not all zero."""
    cfg, model = frozen()
    weights = state(build(seed=1, norm="BN"), "backbone.bottom_up")
    assert any(v.any() for k, v in weights.items() if k.endswith("running_mean"))
    path = save(tmp_path, {"model": weights})
    with pytest.raises(UserError, match=r"8 batch norms, e.g. backbone.fpn_lateral2.norm\)"):
        check_trainable(cfg, model, load_pretrained(model, path).matched)


@pytest.mark.parametrize("name", ["resnet18", "regnetx_002"])
def test_frozen_norms_of_timms_networks_need_weights(name):
    backbone = L(TimmBackbone)(name=name, norm="FrozenBN")
    cfg = OmegaConf.create({"model": {"backbone": backbone}}, flags={"allow_objects": True})
    with pytest.raises(UserError, match=r"batch norms, e.g. backbone\..*norm=SyncBN"):
        check_trainable(cfg, Pretraining(instantiate(backbone)))


def given(norm: str) -> tuple[OmegaConf, Pretraining, nn.Module]:
    """A built detector, whose stem and res2 are frozen, and a pre-training of its modules."""
    config = detector_config(norm=norm)
    config.backbone.bottom_up.freeze_at = 2
    detector = instantiate(config)
    cfg = OmegaConf.create({"model": as_lazy_detector(detector)}, flags={"allow_objects": True})
    return cfg, Pretraining(detector.backbone), detector


def test_a_built_detector_without_statistics_may_have_weights(tmp_path, caplog):
    cfg, model, detector = given("LN")
    with caplog.at_level(logging.WARNING):
        check_trainable(cfg, model)
    (record,) = caplog.records
    # 3 convolutions, 3 norms with weight and bias
    assert "9 parameters, e.g. backbone.bottom_up.stem.conv1.weight" in record.message
    assert "if they are random, call requires_grad_(True) on them, or give" in record.message

    # A file that fills other layers only.
    caplog.clear()
    path = save(tmp_path, {"model": state(detector, "backbone.fpn")})
    with caplog.at_level(logging.WARNING):
        check_trainable(cfg, model, load_pretrained(model, path).matched)
    assert "9 parameters" in caplog.messages[-1]

    caplog.clear()
    detector.requires_grad_(True)
    check_trainable(cfg, model)
    assert not caplog.records


def test_a_built_detector_with_fresh_statistics_has_no_weights():
    cfg, model, detector = given("FrozenBN")
    message = r"the detector freezes layers .*: call requires_grad_\(True\) on them, or give"
    with pytest.raises(UserError, match=message):
        check_trainable(cfg, model)
    detector.backbone.bottom_up.stem.conv1.norm.running_mean.fill_(0.5)
    check_trainable(cfg, model)


def test_a_config_whose_code_freezes_layers_has_no_override():
    cfg, model = frozen()
    cfg.model.backbone = L(build)(norm="BN")
    with pytest.raises(
        UserError, match=r"config freezes.*: call requires_grad_\(True\) on them, or"
    ):
        check_trainable(cfg, model)


def test_a_detector_is_only_warned_about(caplog):
    cfg, _ = frozen()
    with caplog.at_level(logging.WARNING):
        check_trainable(cfg, instantiate(cfg.model))
        (record,) = caplog.records
        assert "freezes layers without weights" in record.message
        caplog.clear()
        check_trainable(cfg, build())
        assert not caplog.records
