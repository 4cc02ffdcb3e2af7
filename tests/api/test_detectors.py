"""Detector configs as arguments of several calls."""

from region_pretrain.api import pretraining
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
