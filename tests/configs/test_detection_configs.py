"""Every shipped detection config is complete, can be saved, and follows its protocol."""

import re

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.engine.hooks import get_bn_modules
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import get_norm
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from torch import nn

from region_pretrain.config import CONFIG_ROOT, changed_keys, get_config

FPN_2FC = ["mask_rcnn_r50_fpn_moco.py", "mask_rcnn_r50_fpn_moco_2x.py"]
MINI_COCO = {
    "mask_rcnn_r50_fpn_4conv1fc_mini_coco_5pct.py": (0.05, 5_500, [4_000, 5_000]),
    "mask_rcnn_r50_fpn_4conv1fc_mini_coco_10pct.py": (0.1, 10_000, [7_000, 9_000]),
}
FPN_4CONV1FC = [
    "mask_rcnn_r50_fpn_4conv1fc.py",
    "mask_rcnn_r50_fpn_4conv1fc_2x.py",
    "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5.py",
    "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5_2x.py",
    *MINI_COCO,
]
INFOMIN = ["mask_rcnn_r50_fpn_infomin.py"]
C4 = ["mask_rcnn_r50_c4_moco.py", "mask_rcnn_r50_c4_moco_2x.py"]
VOC = ["faster_rcnn_r50_c4_voc.py"]
#: See test_transformer_configs.py.
TRANSFORMERS = [
    "mask_rcnn_swin_t_fpn.py",
    "mask_rcnn_swin_b_fpn.py",
    "mask_rcnn_convnext_t_fpn.py",
    "mask_rcnn_vitdet_b.py",
]
FPN = FPN_2FC + FPN_4CONV1FC + INFOMIN
ALL = FPN + C4 + VOC
#: Mask R-CNN config -> that of the same detector for boxes without masks.
BOXES_ONLY = {name: name.replace("mask_rcnn", "faster_rcnn") for name in FPN + C4}
SHAPES = "mask_rcnn_r18_fpn_shapes.py"
BOXES_ONLY[SHAPES] = "faster_rcnn_r18_fpn_shapes.py"


def build(name: str) -> nn.Module:
    with torch.device("meta"):
        return instantiate(get_config(f"detection/{name}").model)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def norms(module: nn.Module) -> list[nn.Module]:
    classes = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d, NaiveSyncBatchNorm, nn.GroupNorm)
    return [m for m in module.modules() if isinstance(m, classes)]


def learning_rates(cfg, iterations) -> list[float]:
    multiplier = instantiate(cfg.lr_multiplier)
    return [cfg.optimizer.lr * multiplier(i / cfg.train.max_iter) for i in iterations]


def test_every_config_is_in_this_file():
    shipped = {p.name for p in (CONFIG_ROOT / "detection").glob("*.py")}
    assert shipped == {*ALL, *TRANSFORMERS, SHAPES, *BOXES_ONLY.values()}


@pytest.mark.parametrize("name", ALL)
def test_five_names_saved_read_back_overridden_and_built(name, tmp_path):
    cfg = get_config(f"detection/{name}")
    assert set(cfg) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}

    saved = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(saved))
    assert not (tmp_path / "config.yaml.pkl").exists()  # Detectron2's fallback if YAML fails
    again = LazyConfig.load(str(saved))
    LazyConfig.save(again, str(tmp_path / "again.yaml"))
    assert (tmp_path / "again.yaml").read_text() == saved.read_text()

    again = LazyConfig.apply_overrides(
        again,
        [
            "model.roi_heads.num_classes=7",
            "optimizer.lr=0.005",
            "dataloader.train.total_batch_size=4",
            "train.init_checkpoint=weights.pth",
        ],
    )
    assert (again.optimizer.lr, again.dataloader.train.total_batch_size) == (0.005, 4)
    assert again.train.init_checkpoint == "weights.pth"
    with torch.device("meta"):
        model = instantiate(again.model)
    assert isinstance(model, GeneralizedRCNN)
    assert model.roi_heads.box_predictor.cls_score.out_features == 8

    again.optimizer.params.model = model
    optimizer = instantiate(again.optimizer)
    grouped = sum(p.numel() for g in optimizer.param_groups for p in g["params"])
    assert grouped == parameters(model)  # nothing is frozen
    instantiate(again.lr_multiplier)
    instantiate(again.dataloader.train.mapper)
    instantiate(again.dataloader.test.mapper)


@pytest.mark.parametrize("name", ALL)
def test_common_protocol(name):
    cfg = get_config(f"detection/{name}")
    model = build(name)
    # RGB from file to network, as torchvision's weights expect
    assert list(cfg.model.pixel_mean) == [123.675, 116.28, 103.53]
    assert list(cfg.model.pixel_std) == [58.395, 57.12, 57.375]
    assert model.input_format == "RGB"
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        assert loader.mapper.image_format == "RGB"
    # nothing frozen, the stride in the 3x3
    assert all(p.requires_grad for p in model.parameters())
    body = getattr(model.backbone, "bottom_up", model.backbone)
    assert {m.__class__ for m in norms(body)} == {nn.SyncBatchNorm}
    assert (body.res3[0].conv1.stride, body.res3[0].conv2.stride) == ((1, 1), (2, 2))
    # batch 16, lr 0.02, no decay of norms, precise BN over 200 batches
    assert cfg.dataloader.train.total_batch_size == 16
    assert cfg.train.base_batch_size in (None, 16)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.02, 0.9)
    assert cfg.optimizer.params.weight_decay_norm == 0.0
    assert cfg.train.precise_bn == {"enabled": True, "num_iter": 200}
    assert len(get_bn_modules(model)) == len(norms(model))
    assert cfg.lr_multiplier.max_iter == cfg.train.max_iter
    test_size = cfg.dataloader.test.mapper.augmentations[0]
    assert (test_size.short_edge_length, test_size.max_size) == (800, 1333)


@pytest.mark.parametrize("name", ALL)
def test_schedule(name):
    cfg = get_config(f"detection/{name}")
    warmup = 1_000
    if name in MINI_COCO:
        _, length, steps = MINI_COCO[name]
    elif name in VOC:
        length, steps, warmup = 24_000, [18_000, 22_000], 100
    elif "_2x" in name:
        length, steps = 180_000, [120_000, 160_000]
    else:
        length, steps = 90_000, [60_000, 80_000]
    assert cfg.train.max_iter == length
    first, second = steps
    at = [0, warmup, first - 1, first + 1, second - 1, second + 1, length - 1]
    expected = [0.00002, 0.02, 0.02, 0.002, 0.002, 0.0002, 0.0002]
    assert learning_rates(cfg, at) == pytest.approx(expected, rel=1e-6)
    half = learning_rates(cfg, [warmup // 2])[0]
    assert half == pytest.approx((0.00002 + 0.02) / 2, rel=1e-6)


@pytest.mark.parametrize("name", ALL)
def test_weight_decay(name):
    lighter = "wd2.5e-5" in name or name in MINI_COCO
    cfg = get_config(f"detection/{name}")
    assert cfg.optimizer.weight_decay == (2.5e-5 if lighter else 1e-4)


@pytest.mark.parametrize("name", FPN)
def test_fpn_detectors(name):
    cfg, model = get_config(f"detection/{name}"), build(name)
    assert isinstance(model.roi_heads, StandardROIHeads)
    trunk = parameters(model.backbone.bottom_up)
    assert trunk == 23_508_032  # torchvision's ResNet-50 without its classifier
    assert parameters(model.backbone) - trunk == 3_346_432
    fpn = [m for n, m in model.backbone.named_modules() if n.startswith("fpn_") and "norm" in n]
    assert len(fpn) == 8 and {m.__class__ for m in fpn} == {nn.SyncBatchNorm}
    assert model.backbone.fpn_lateral2.bias is None
    size = cfg.dataloader.train.mapper.augmentations[0]
    assert list(size.short_edge_length) == [640, 672, 704, 736, 768, 800]
    assert (size.sample_style, size.max_size) == ("choice", 1333)
    assert cfg.dataloader.train.mapper.use_instance_mask
    assert cfg.dataloader.train.dataset.names == "coco_2017_train"
    assert cfg.dataloader.test.dataset.names == "coco_2017_val"
    assert cfg.dataloader.evaluator.dataset_name == "coco_2017_val"


@pytest.mark.parametrize("name", FPN_2FC)
def test_moco_box_head(name):
    heads = build(name).roi_heads
    # fc1 12544 -> 1024, fc2 1024 -> 1024
    assert parameters(heads.box_head) == 12_544 * 1_024 + 1_024 + 1_024 * 1_024 + 1_024
    assert norms(heads) == []


@pytest.mark.parametrize("name", FPN_4CONV1FC + INFOMIN)
def test_4conv1fc_heads(name):
    cfg, heads = get_config(f"detection/{name}"), build(name).roi_heads
    pooled = 14 if name in INFOMIN else 7
    assert heads.box_pooler.output_size == (pooled, pooled)
    # 7x7: 4 * (9 * 256 * 256 + 512) + 12544 * 1024 + 1024; 14x14: 3 * 12544 * 1024 more
    assert parameters(heads.box_head) == 15_207_424 + (name in INFOMIN) * 38_535_168
    assert heads.box_head.conv1.bias is None
    assert {m.__class__ for m in norms(heads.box_head)} == {nn.SyncBatchNorm}
    assert {m.__class__ for m in norms(heads.mask_head)} == {nn.SyncBatchNorm}
    assert (len(norms(heads.box_head)), len(norms(heads.mask_head))) == (4, 4)
    assert cfg.train.amp.enabled == (name in INFOMIN)


def test_names_match_those_of_pretrained_weights():
    names = set(build("mask_rcnn_r50_fpn_4conv1fc.py").state_dict())
    assert names >= {
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_lateral2.norm.running_mean",
        "backbone.bottom_up.stem.conv1.norm.weight",
        "backbone.bottom_up.res5.2.conv3.norm.weight",
        "backbone.bottom_up.res2.0.shortcut.norm.weight",
        "roi_heads.box_head.conv1.weight",
        "roi_heads.box_head.conv1.norm.running_var",
        "roi_heads.box_head.fc1.bias",
    }


@pytest.mark.parametrize("name", C4 + VOC)
def test_c4_detectors(name):
    model = build(name)
    heads = model.roi_heads
    assert isinstance(heads, Res5ROIHeads)
    assert heads.pooler.output_size == (14, 14)
    assert {m.__class__ for m in norms(heads.res5)} == {nn.SyncBatchNorm}
    assert (heads.res5[0].conv1.stride, heads.res5[0].conv2.stride) == ((1, 1), (2, 2))
    assert parameters(model.backbone) + parameters(heads.res5) == 23_508_032 + 2 * 2_048
    names = set(model.state_dict())
    for index in range(3):
        assert f"roi_heads.res5.{index}.conv3.norm.running_mean" in names
    extra = {n for n in names if n.startswith("roi_heads.res5.norm.")}
    entries = "weight", "bias", "running_mean", "running_var", "num_batches_tracked"
    assert extra == {f"roi_heads.res5.norm.{entry}" for entry in entries}
    # MoCo's Base-RCNN-C4-BN.yaml: 6000 before and 1000 after NMS in testing
    rpn = model.proposal_generator
    assert (rpn.pre_nms_topk, rpn.post_nms_topk) == (
        {True: 12_000, False: 6_000},
        {True: 2_000, False: 1_000},
    )
    assert heads.mask_on == (name in C4)


@pytest.mark.parametrize("name", BOXES_ONLY)
def test_boxes_only_differs_from_its_sibling_only_in_the_masks(name):
    """Same detector, data and schedule, so a checkpoint of either fills the other's shared part."""
    masks, boxes = get_config(f"detection/{name}"), get_config(f"detection/{BOXES_ONLY[name]}")
    changed = changed_keys(masks, boxes)
    mapper = changed.pop("dataloader.train.mapper.use_instance_mask")
    assert mapper == ("True", "False")
    if name == SHAPES:
        changed.pop("train.output_dir")
    assert changed and all(
        re.match(r"model\.roi_heads\.mask_(head|pooler|in_features)", key) for key in changed
    )
    states = []
    for cfg in (masks, boxes):
        with torch.device("meta"):
            model = instantiate(cfg.model)
        states.append({key: value.shape for key, value in model.state_dict().items()})
    assert not model.roi_heads.mask_on
    expected = {k: v for k, v in states[0].items() if not k.startswith("roi_heads.mask_head.")}
    assert states[1] == expected and len(states[0]) > len(expected) > 100


def test_voc_data():
    cfg = get_config("detection/faster_rcnn_r50_c4_voc.py")
    train, test = cfg.dataloader.train, cfg.dataloader.test
    assert list(train.dataset.names) == ["voc_2007_trainval", "voc_2012_trainval"]
    assert test.dataset.names == cfg.dataloader.evaluator.dataset_name == "voc_2007_test"
    size = train.mapper.augmentations[0]
    assert list(size.short_edge_length) == list(range(480, 801, 32))
    assert cfg.model.roi_heads.num_classes == 20
    assert cfg.model.roi_heads.box_predictor.num_classes == 20


@pytest.mark.parametrize("name", MINI_COCO)
def test_mini_coco_uses_the_first_images(name):
    dataset = get_config(f"detection/{name}").dataloader.train.dataset
    assert (dataset.names, dataset.fraction) == ("coco_2017_train", MINI_COCO[name][0])
    assert dataset._target_.__name__ == "first_fraction"


def test_syncbn_is_plain_batch_norm_in_one_process_on_cpu():
    torch.manual_seed(0)
    sync, plain = get_norm("SyncBN", 6), nn.BatchNorm2d(6)
    x = torch.randn(4, 6, 5, 5)
    assert torch.equal(sync(x), plain(x))
    assert torch.equal(sync.running_var, plain.running_var)
