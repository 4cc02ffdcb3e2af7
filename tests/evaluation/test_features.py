"""Levels of every kind of detector, against a slow restatement of their features."""

import math

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.data import transforms as T
from detectron2.layers import CycleBatchNormList, ShapeSpec
from detectron2.modeling.backbone import SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.structures import Boxes
from torch import nn
from torchvision.ops import roi_align
from zoo import NARROW

from region_pretrain.config import get_config, load_config
from region_pretrain.errors import UserError
from region_pretrain.evaluation.features import load_region, model_reader, read_regions
from region_pretrain.modeling.narrow_resnet import narrow_resnet18_stages
from region_pretrain.modeling.trunk import Trunk

DETECTOR = [*NARROW, "MODEL.ROI_HEADS.NUM_CLASSES=3", "MODEL.RETINANET.NUM_CLASSES=3"]
DETECTOR += ["MODEL.PIXEL_STD=[57.375,57.12,58.395]"]


def yacs_detector(name: str, *overrides: str) -> nn.Module:
    torch.manual_seed(0)
    return instantiate(load_config(name, [*DETECTOR, *overrides]).model).eval()


def narrow_backbone(backbone) -> None:
    """Replace the ResNet-50 of a LazyConfig's FPN by a narrow ResNet-18."""
    backbone.bottom_up.stem.out_channels = 8
    backbone.bottom_up.stages = L(narrow_resnet18_stages)(channels=8, norm="BN")
    backbone.out_channels = 16
    if "top_block" in backbone and "in_channels" in backbone.top_block:
        backbone.top_block.update(in_channels=16, out_channels=16)


def fcos() -> nn.Module:
    torch.manual_seed(0)
    cfg = model_zoo.get_config("common/models/fcos.py").model
    narrow_backbone(cfg.backbone)
    cfg.head.update(conv_dims=[16] * 2, num_classes=3, norm="")
    cfg.head.input_shape = [ShapeSpec(channels=16)] * 5
    cfg.num_classes = 3
    return instantiate(cfg).eval()


class WithPixels(nn.Module):
    """A backbone and what a probe needs to read images."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.input_format = backbone, "RGB"
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 110.0))
        self.register_buffer("pixel_std", torch.full((3, 1, 1), 60.0))


def simple_pyramid() -> nn.Module:
    """ViTDet's backbone."""
    torch.manual_seed(0)
    vit = ViT(img_size=128, patch_size=16, embed_dim=16, depth=1, num_heads=2, window_size=0)
    return SimpleFeaturePyramid(
        vit, "last_feat", 16, (4.0, 2.0, 1.0, 0.5), LastLevelMaxPool(), norm="LN", square_pad=128
    )


def inputs(model, record, input_format):
    """One normalised and padded image (1, 3, H, W) and its boxes."""
    image, boxes, _ = load_region(record, input_format)
    image = (image - model.pixel_mean) / model.pixel_std
    backbone = model.backbone
    square = getattr(backbone, "padding_constraints", {}).get("square_size", 0)
    multiple = getattr(backbone, "size_divisibility", 0) or 1
    height, width = (square or math.ceil(n / multiple) * multiple for n in image.shape[-2:])
    padded = image.new_zeros(1, 3, height, width)
    padded[0, :, : image.shape[1], : image.shape[2]] = image
    return padded, boxes


def pooled(maps, boxes, strides):
    """Each box on its level: 224 pixels on level 4, 112 on level 3 (FPN, equation 1)."""
    found = []
    for x0, y0, x1, y1 in boxes.tolist():
        level = math.floor(4 + math.log2(math.sqrt((x1 - x0) * (y1 - y0)) / 224 + 1e-8))
        level = min(max(level, int(math.log2(min(strides)))), int(math.log2(max(strides))))
        features = maps[f"p{level}"]
        box = torch.tensor([[x0, y0, x1, y1]])
        found.append(roi_align(features, [box], 7, 1 / 2**level, aligned=True)[0])
    return torch.stack(found)


def trunk_vectors(maps, boxes, names):
    """Last two maps: RoIAligned, averaged, normalised, concatenated."""
    vectors = []
    for box in boxes:
        parts = []
        for name, stride in names.items():
            region = roi_align(maps[name], [box[None]], 7, 1 / stride, aligned=True)
            parts.append(region[0].mean(dim=(1, 2)) / region[0].mean(dim=(1, 2)).norm())
        vectors.append(torch.cat(parts))
    return torch.stack(vectors)


def found_features(model, dicts):
    """Levels and features of the first two images, one after the other."""
    reader = model_reader(model)
    regions = read_regions(model, reader, dicts[:2], batch_size=1)
    assert regions.labels.tolist() == [
        a["category_id"] for d in dicts[:2] for a in d["annotations"] if not a["iscrowd"]
    ]
    return regions.features


def close(found, expected):
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "order"), [("retinanet", "BGR"), ("fcos", "BGR"), ("fcos", "RGB")]
)
def test_one_stage_detectors_pool_their_pyramid_and_tower(dicts, kind, order):
    """FCOS has no ``input_format``: its mean tells the order of the channels."""
    retinanet = kind == "retinanet"
    model = yacs_detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml") if retinanet else fcos()
    if order == "RGB":
        model.pixel_mean = model.pixel_mean.flip(0)
    found = found_features(model, dicts)
    assert list(found) == ["trunk", "fpn", "tower"]
    expected = {"trunk": [], "fpn": [], "tower": []}
    with torch.no_grad():
        for record in dicts[:2]:
            image, boxes = inputs(model, record, order)
            trunk, maps = model.backbone.bottom_up(image), model.backbone(image)
            tower = {name: model.head.cls_subnet(x) for name, x in maps.items()}
            names = {"res4": 16, "res5": 32}
            expected["trunk"].append(trunk_vectors(trunk, boxes, names))
            for level, some in (("fpn", maps), ("tower", tower)):
                expected[level].append(pooled(some, boxes, (8, 16, 32)).mean(dim=(2, 3)))
    for level in expected:
        close(found[level], expected[level])


def test_a_probe_does_not_shift_norms_with_statistics_per_level(dicts):
    """Three of five levels are read: the next batch would begin with the fourth."""
    model = yacs_detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml", "MODEL.RETINANET.NORM=BN")
    norms = [m for m in model.modules() if isinstance(m, CycleBatchNormList)]
    for norm in norms:
        for level, part in enumerate(norm):
            part.running_mean.fill_(0.1 * level)
    found = read_regions(model, model_reader(model), [dicts[0]] * 2, batch_size=1).features
    first, second = found["tower"].chunk(2)
    torch.testing.assert_close(first, second)
    assert norms and {norm._pos for norm in norms} == {0}


def test_each_head_of_a_cascade_is_a_level(dicts):
    model = yacs_detector("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml")
    found = found_features(model, dicts)
    stages = [f"head_stage{i}" for i in range(3)]
    assert list(found) == ["trunk", "fpn", *stages]
    expected = {stage: [] for stage in stages}
    with torch.no_grad():
        for record in dicts[:2]:
            image, boxes = inputs(model, record, "BGR")
            maps = model.backbone(image)
            features = [maps[name] for name in ("p2", "p3", "p4", "p5")]
            regions = model.roi_heads.box_pooler(features, [Boxes(boxes)])
            for stage, head in zip(stages, model.roi_heads.box_head, strict=True):
                expected[stage].append(head(regions))
    for stage in stages:
        assert found[stage].shape == (5, 24)
        close(found[stage], expected[stage])
    assert not torch.allclose(found["head_stage0"], found["head_stage1"])


def test_c4_pools_res4_and_applies_res5(dicts):
    model = yacs_detector("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml")
    found = found_features(model, dicts)
    assert list(found) == ["trunk", "fpn", "head"]
    expected = {"trunk": [], "fpn": [], "head": []}
    with torch.no_grad():
        for record in dicts[:2]:
            image, boxes = inputs(model, record, "BGR")
            maps = model.backbone(image)
            expected["trunk"].append(trunk_vectors(maps, boxes, {"res4": 16}))
            regions = roi_align(maps["res4"], [boxes], 14, 1 / 16, aligned=True)
            expected["fpn"].append(regions.mean(dim=(2, 3)))
            expected["head"].append(model.roi_heads.res5(regions).mean(dim=(2, 3)))
    for level in expected:
        close(found[level], expected[level])


def test_a_simple_pyramid_has_the_map_of_its_vit_and_four_levels(dicts):
    model = WithPixels(simple_pyramid()).eval()
    found = found_features(model, dicts)
    assert list(found) == ["trunk", "fpn"]
    expected = {"trunk": [], "fpn": []}
    with torch.no_grad():
        for record in dicts[:2]:
            image, boxes = inputs(model, record, "RGB")
            assert image.shape[-2:] == (128, 128)
            trunk = model.backbone.net(image)
            expected["trunk"].append(trunk_vectors(trunk, boxes, {"last_feat": 16}))
            regions = pooled(model.backbone(image), boxes, (4, 8, 16, 32))
            expected["fpn"].append(regions.mean(dim=(2, 3)))
    for level in expected:
        close(found[level], expected[level])


def test_a_bare_trunk_has_one_level(dicts):
    fpn = yacs_detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml").backbone
    alone, wrapped = (
        found_features(WithPixels(backbone).eval(), dicts)
        for backbone in (fpn.bottom_up, Trunk(bottom_up=fpn.bottom_up))
    )
    assert list(alone) == list(wrapped) == ["trunk"]
    assert torch.equal(alone["trunk"], wrapped["trunk"])
    vit = instantiate(get_config("detection/mask_rcnn_vitdet_b.py").model.backbone.net)
    trunk = Trunk(net=vit)
    assert (trunk.size_divisibility, trunk.padding_constraints) == (
        vit.size_divisibility, vit.padding_constraints
    )  # fmt: skip
    assert Trunk(bottom_up=fpn).size_divisibility == fpn.size_divisibility == 32
    with pytest.raises(UserError, match="needs a model with a backbone, and Linear has none"):
        model_reader(nn.Linear(1, 1))


def test_mcl_without_a_pyramid_has_its_trunk(dicts):
    """Its box pooler reads maps that are not the backbone's."""
    path = "projects/MCL/configs/mcl_r50_32xb128-100ep_imagenet.py"
    model = instantiate(get_config(path).model).eval()
    reader = model_reader(model)
    assert list(reader.levels) == ["trunk"]
    assert list(found_features(model, dicts)) == ["trunk"]


def test_the_parameters_of_each_level():
    model = yacs_detector("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml")
    reader = model_reader(model)
    names = {p: name for name, p in model.named_parameters()}
    prefixes = {
        level: {".".join(names[p].split(".")[:2]) for p in reader.parameters_of(level)}
        for level in reader.levels
    }
    assert prefixes["trunk"] == {"backbone.bottom_up"}
    assert prefixes["fpn"] == {
        f"backbone.fpn_{kind}{i}" for kind in ("lateral", "output") for i in range(2, 6)
    }
    assert prefixes["head_stage1"] == {"roi_heads.box_head"}
    assert {names[p].split(".")[2] for p in reader.parameters_of("head_stage1")} == {"1"}
    c4 = model_reader(yacs_detector("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml"))
    assert c4.parameters_of("fpn") == c4.parameters_of("trunk") != c4.parameters_of("head")
    dense = yacs_detector("COCO-Detection/retinanet_R_50_FPN_1x.yaml")
    names = {p: name for name, p in dense.named_parameters()}
    found = {names[p] for p in model_reader(dense).parameters_of("fpn")}
    assert "backbone.fpn_lateral3.weight" in found
    assert not any("top_block" in name for name in found)  # its maps are not pooled


def test_boxes_follow_the_augmentations_and_random_states_stay(dicts):
    state = torch.get_rng_state()
    image, boxes, _ = load_region(dicts[0], "RGB")
    augmentations = [T.ResizeShortestEdge(120, 200), T.RandomFlip(prob=1.0)]
    larger, moved, _ = load_region(dicts[0], "RGB", augmentations)
    assert image.shape == (3, 60, 90) and larger.shape == (3, 120, 180)
    expected = 2 * boxes
    expected[:, [0, 2]] = 180 - expected[:, [2, 0]]
    torch.testing.assert_close(moved, expected)
    assert torch.equal(torch.get_rng_state(), state)


def test_an_image_of_another_size_than_its_record_is_refused(dicts):
    record = {**dicts[0], "width": dicts[0]["width"] * 2}
    with pytest.raises(UserError, match="annotations are for .*: correct its width and height"):
        load_region(record, "RGB")
    del record["width"]
    load_region(record, "RGB")


def test_regions_may_be_kept_by_the_main_process_alone(dicts, monkeypatch):
    model = yacs_detector("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    reader = model_reader(model)
    whole = read_regions(model, reader, dicts[:2])
    alone = read_regions(model, reader, dicts[:2], everywhere=False)
    assert torch.equal(whole.labels, alone.labels)
    monkeypatch.setattr("region_pretrain.evaluation.features.comm.gather", lambda data: [])
    assert read_regions(model, reader, dicts[:2], everywhere=False) is None
