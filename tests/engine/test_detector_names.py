"""A method's modules must have the names of the detector's."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import GeneralizedRCNN

from region_pretrain.api.pretraining import _build_around
from region_pretrain.engine.methods import load_method
from region_pretrain.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "projects"))
sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))
from narrow_detectors import DETECTORS
from zoo import NARROW, TRAINABLE

FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"


def refuse(detector, wrong: str, module: str, near: str, overrides: list[str]) -> None:
    with pytest.raises(UserError) as error:
        cfg = load_method("soco", detector, [*overrides, f"model.head_name={wrong}"])
        assert isinstance(detector, torch.nn.Module)  # checked when the model is built
        _build_around(detector)(cfg, torch.device("cpu"))
    assert str(error.value) == (
        f"SoCo.detector_modules: the detector has no module {module!r}, so its weights would not "
        f"be loaded; did you mean {near}?"
    )


class Renamed(GeneralizedRCNN):
    """A detector whose modules have other names than its arguments."""

    def __init__(self, **parts) -> None:
        super().__init__(**parts)
        self.region_heads = self.roi_heads


@pytest.mark.parametrize("kind", ["lazy", "yacs", "built"])
def test_names_that_the_detector_does_not_have_are_refused(kind):
    detector = FPN if kind == "yacs" else DETECTORS["Faster/Mask R-CNN, FPN"]()
    detector = instantiate(detector) if kind == "built" else detector
    overrides = [*NARROW, *TRAINABLE] if kind == "yacs" else []
    refuse(detector, "roi_head.box_head", "roi_head", "roi_heads", overrides)
    refuse(detector, "roi_heads.box_hed", "roi_heads.box_hed", "roi_heads.box_head", overrides)


def test_modules_may_have_other_names_than_the_arguments():
    detector = DETECTORS["Faster/Mask R-CNN, FPN"]()
    detector._target_ = Renamed
    load_method("soco", detector, ["model.head_name=region_heads.box_head"])
    refuse(detector, "regio_heads.box_head", "regio_heads", "region_heads", [])
