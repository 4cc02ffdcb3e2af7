"""Detector configs as arguments: yacs configs, and the copy beside a pre-training."""

import pytest
from detectron2.config import get_cfg

import region_pretrain as rp
from region_pretrain.api import pretraining
from region_pretrain.api.detectors import detection_config
from region_pretrain.api.pretraining import compose
from region_pretrain.config import get_config, to_yaml


def test_the_saved_detector_has_the_same_meaning_in_any_folder(tmp_path, monkeypatch):
    cfg = get_config("detection/mask_rcnn_r18_fpn_shapes.py")
    cfg.dataloader.test.dataset.names = "coco://ann.json?images=imgs"
    cfg.train.register = ["reg.py"]
    (tmp_path / "det.yaml").write_text(to_yaml(cfg))
    (tmp_path / "reg.py").touch()
    monkeypatch.chdir(tmp_path)
    saved = pretraining._describe("det.yaml")
    assert saved.train.register == [str(tmp_path / "reg.py")]
    names = f"coco://{tmp_path}/ann.json?images={tmp_path}/imgs"
    assert saved.dataloader.test.dataset.names == names


def test_yacs_configs_are_detectors(region_folder):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.RESNETS.NORM = "BN"
    composed = rp.pretrain_config("moco", images=region_folder.images, detector=cfg)
    assert composed.model.res5.norm == "BN"
    # The defaults have no data sets; those of a fine-tuning come from its own arguments.
    upper = ["MODEL.RESNETS.STEM_OUT_CHANNELS=32", "MODEL.RESNETS.NORM=SyncBN"]
    for detector in (cfg, "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"):
        given = {"detector": detector, "overrides": [*upper, "MODEL.BACKBONE.FREEZE_AT=0"]}
        composed = compose("moco", images=region_folder.images, **given)
        described = detection_config(composed.detector).model.cfg.MODEL
        assert (described.RESNETS.STEM_OUT_CHANNELS, described.RESNETS.NORM) == (32, "SyncBN")
        assert described.BACKBONE.FREEZE_AT == 0 and composed.cfg.model.res5.norm == "SyncBN"
    assert cfg.MODEL.RESNETS.NORM == "BN"
    with pytest.raises(rp.UserError, match="the detector: MODEL.BACKBONE.NAME=x"):
        cfg.MODEL.BACKBONE.NAME = "x"
        rp.pretrain_config("moco", detector=cfg)


def test_weights_of_the_detector_are_no_override_of_a_pretraining():
    for detector in (get_cfg(), "COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"):
        with pytest.raises(rp.UserError, match=r"use train.init_checkpoint=R-50\.pkl$"):
            rp.pretrain_config("moco", detector=detector, overrides=["MODEL.WEIGHTS=R-50.pkl"])
