"""What is derived from a detector's config or modules."""

import copy
import sys
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall, LazyConfig, get_cfg, instantiate
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone, SwinTransformer
from omegaconf import DictConfig

from region_pretrain.api.detectors import detection_config
from region_pretrain.config import get_config
from region_pretrain.convert.facts import differences, facts_of
from region_pretrain.engine.methods import load_detector
from region_pretrain.errors import UserError
from region_pretrain.modeling.detector import Detector
from region_pretrain.modeling.given import as_lazy_detector
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.pyramid import freeze_unread, pyramid_maps
from region_pretrain.modeling.region_head import SharedHeads, Towers
from region_pretrain.modeling.timm_backbone import TimmBackbone

sys.path.insert(0, str(Path(__file__).parents[1] / "projects"))
from narrow_detectors import DETECTORS

STRIDES = {name: [4, 8, 16, 32] for name in DETECTORS} | {
    "RetinaNet": [8, 16, 32],
    "FCOS": [8, 16, 32],
    "C4": [16],
    "DC5": [16],
    "plain ViT": [16],
}
TRUNK_MAPS = dict.fromkeys(DETECTORS, ("res5", 32)) | {
    "C4": ("res4", 24),
    "DC5": ("res5", 16),
    "ViTDet": ("last_feat", 16),
    "plain ViT": ("last_feat", 16),
    "Swin, FPN": ("p3", 64),
    "MViTv2, FPN": ("scale5", 64),
    "RegNet, FPN": ("s4", 128),
    "timm's Swin, FPN": ("res5", 64),
    "timm's ResNeSt, FPN": ("res5", 128),
    "timm's EfficientNet, FPN": ("res5", 320),
    "timm's ViT, simple pyramid": ("res4", 16),
}
HEADS = dict.fromkeys(DETECTORS, ("roi_heads.box_head", 24)) | {
    "RetinaNet": ("head", 64),
    "FCOS": ("head", 64),
    "C4": ("roi_heads.res5", 32),
}


@pytest.mark.parametrize("built", [False, True], ids=["config", "module"])
@pytest.mark.parametrize("name", DETECTORS)
def test_what_is_derived(name, built):
    detector = DETECTORS[name]()
    parts = Detector(instantiate(detector) if built else detector)
    assert parts.strides == STRIDES[name]
    assert parts.trunk_map == TRUNK_MAPS[name]
    assert (parts.head.name, parts.head.channels) == HEADS[name]
    channels = 24 if name == "C4" else 16
    size = 14 if name == "C4" else 7
    assert parts.pooled_shape == (channels, size, size)
    top = 1 if len(STRIDES[name]) == 1 else len(STRIDES[name])
    assert len(parts.levels) in (0, top)
    assert torch.tensor(list(parts.pixels["pixel_mean"])).shape == (3,)
    assert parts.pixels["input_format"] == detector.get("input_format", "BGR")


def test_scales_of_levels_are_socos():
    scales = {4: [48, 96, 192, 224], 3: [96, 192, 224], 1: [224]}
    for name, make in DETECTORS.items():
        parts = Detector(make())
        assert parts.level_scales(224) == scales[len(parts.strides)], name


def test_a_built_detector_gives_its_own_modules():
    rcnn = instantiate(DETECTORS["Faster/Mask R-CNN, FPN"]())
    parts = Detector(rcnn)
    assert parts.backbone is rcnn.backbone and parts.pooler is rcnn.roi_heads.box_pooler
    assert parts.head.part is rcnn.roi_heads.box_head
    assert parts.trunk.bottom_up is rcnn.backbone.bottom_up
    retina = instantiate(DETECTORS["RetinaNet"]())
    assert isinstance(Detector(retina).head.part, Towers)
    assert Detector(retina).head.part.cls_subnet is retina.head.cls_subnet


def test_one_head_for_all_stages_of_a_cascade():
    shared = instantiate(Detector(DETECTORS["Cascade R-CNN, FPN"]()).head.part)
    assert isinstance(shared, SharedHeads) and len(shared) == 3
    assert len(list(shared.parameters())) == 4  # two fc layers
    state = shared.state_dict()
    assert len(state) == 12 and torch.equal(state["0.fc1.weight"], state["2.fc1.weight"])


def test_a_yacs_config_and_a_complete_lazy_config_are_detectors():
    cfg = get_cfg()
    cfg.merge_from_list(["MODEL.DEVICE", "meta", "MODEL.RESNETS.RES2_OUT_CHANNELS", 16])
    parts = Detector(cfg)
    with torch.device("meta"):
        stock = build_model(cfg)
    assert parts.head.name == "roi_heads.res5" and parts.res5_channels == 128
    assert parts.pooled_shape[0] == stock.backbone.output_shape()["res4"].channels
    complete = get_config("detection/mask_rcnn_r18_fpn_shapes.py")
    assert Detector(complete).trunk_map == ("res5", 192)
    with pytest.raises(UserError, match="not a detector: it has no backbone or no pixel_mean"):
        Detector(DictConfig({"train": {}}))


def test_fcos_has_the_format_of_its_mapper():
    """Detectron2's FCOS has no ``input_format``."""
    model = DETECTORS["FCOS"]()
    assert "input_format" not in model and Detector(model).pixels["input_format"] == "BGR"
    cfg = DictConfig({"dataloader": {"train": {"mapper": {"image_format": "RGB"}}}})
    cfg._set_flag("allow_objects", True)
    cfg.model = model
    assert Detector(cfg).pixels["input_format"] == "RGB"
    assert "input_format" not in cfg.model  # which would not build any more


def test_fcos_alone_has_the_format_of_its_mean():
    rgb = get_config("detection/fcos_r50_fpn.py").model
    assert "input_format" not in rgb and rgb.pixel_mean[0] > rgb.pixel_mean[2]
    bgr = copy.deepcopy(rgb)
    bgr.pixel_mean = list(rgb.pixel_mean)[::-1]
    for model, wanted in ((rgb, "RGB"), (bgr, "BGR")):
        built = instantiate(model)
        assert Detector(model).pixels["input_format"] == wanted
        assert Detector(built).pixels["input_format"] == wanted
        assert as_lazy_detector(built).input_format == facts_of(built).input_format == wanted
        assert detection_config(model).dataloader.train.mapper.image_format == wanted
    cautions = differences(facts_of(instantiate(bgr)), facts_of(instantiate(rgb)))[1]
    assert any("was trained on BGR images, the detector reads RGB" in text for text in cautions)


def test_a_format_that_the_detector_does_not_take_is_refused():
    cfg = get_config("detection/fcos_r50_fpn.py")
    cfg.model.input_format = "RGB"
    for detector in (cfg, cfg.model):
        with pytest.raises(UserError) as error:
            load_detector(detector)
        assert str(error.value) == (
            "the detector: model.input_format=RGB: FCOS has no argument of this name: leave it "
            "out, and set image_format of dataloader.train.mapper and dataloader.test.mapper"
        )
    with pytest.raises(UserError, match="^model.input_format=RGB: FCOS has no argument"):
        Detector(cfg)


def test_parts_may_refer_to_other_parts_of_the_detector():
    model = get_config("common/models/mask_rcnn_fpn_small.py").model
    model.roi_heads.box_head.input_shape.channels = "${....backbone.out_channels}"
    model.roi_heads.box_pooler.output_size = "${..box_head.input_shape.height}"
    model.norm, model.backbone.norm = "BN", "${model.norm}"
    model.backbone.in_features = ["res2", "res3", "res4", "res5"]
    model.backbone.bottom_up.out_features = "${..in_features}"
    cfg = DictConfig({"model": model}, flags={"allow_objects": True})
    parts = Detector(cfg)
    assert instantiate(parts.trunk).output_shape().keys() == set(model.backbone.in_features)
    head = instantiate(parts.head.part)
    assert next(head.parameters()).shape[1] == model.backbone.out_channels  # a convolution
    assert instantiate(parts.pooler).output_size == (7, 7)


class OtherPyramid(Backbone):
    """A feature pyramid that is no subclass of Detectron2's."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, 8, 1)
        self._out_features, self._out_feature_channels = ["p3"], {"p3": 8}
        self._out_feature_strides = {"p3": 8}

    def forward(self, x):
        return {"p3": self.conv(x)}


def test_a_one_stage_detector_with_another_pyramid_is_refused():
    model = DETECTORS["RetinaNet"]()
    model.backbone = LazyCall(OtherPyramid)()
    with pytest.raises(
        UserError, match="OtherPyramid is neither an FPN nor a .*: use a method that"
    ):
        _ = Detector(model).head.channels


def test_towers_with_a_norm_per_level_are_refused():
    model = DETECTORS["RetinaNet"]()
    model.head.norm = "SyncBN"
    with pytest.raises(UserError, match="batch norm for each level.*set its norm to GN"):
        _ = Detector(model).head.channels


def test_transformers_are_built_on_the_meta_device():
    with on_meta_device():
        swin = SwinTransformer(embed_dim=8, depths=[1, 1, 1, 1], drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob for layer in swin.layers[1:] for block in layer.blocks]
    assert rates == pytest.approx([0.1, 0.2, 0.3])
    assert all(parameter.is_meta for parameter in swin.parameters())


@pytest.mark.parametrize("name", ["Swin, FPN", "RetinaNet", "ViTDet", "MViTv2, FPN"])
def test_unread_parameters_are_those_without_gradient(name):
    backbone = instantiate(DETECTORS[name]().backbone)
    frozen = freeze_unread(backbone, ["p4"])
    assert frozen
    maps = pyramid_maps(backbone, torch.randn(2, 3, 64, 64), {"p4": slice(0, 2)})
    maps["p4"].square().sum().backward()
    for key, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == (not parameter.requires_grad), key
    if name == "Swin, FPN":
        assert {"bottom_up.norm0", "bottom_up.norm1"} <= set(frozen)
    if name == "RetinaNet":
        assert "top_block" in frozen and "fpn_output5" in frozen


def test_a_trunk_for_one_size_is_read_at_that_size():
    trunk = TimmBackbone("mvitv2_tiny", img_size=64)
    assert trunk.padding_constraints["square_size"] == 64
    assert freeze_unread(trunk, ["res3"])


def test_lazy_parts_follow_later_overrides():
    """The pre-training config contains the detector's nodes, so its overrides apply to them."""
    path = get_config.__globals__["CONFIG_ROOT"] / "detection/mask_rcnn_r18_fpn_shapes.py"
    detector = LazyConfig.load(str(path)).model
    trunk = Detector(detector).trunk
    assert trunk.bottom_up.freeze_at == 0 and trunk.bottom_up.stem.out_channels == 24
