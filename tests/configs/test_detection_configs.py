"""Every shipped detection config is complete, can be saved, and follows its protocol."""

import functools
import re

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine.hooks import get_bn_modules
from detectron2.layers import FrozenBatchNorm2d, NaiveSyncBatchNorm
from detectron2.layers.batch_norm import get_norm
from detectron2.modeling import FCOS, GeneralizedRCNN, PanopticFPN, RetinaNet
from detectron2.modeling.roi_heads import Res5ROIHeads, StandardROIHeads
from torch import nn

from region_pretrain import config
from region_pretrain.config import CONFIG_ROOT, changed_keys

get_config = functools.cache(config.get_config)  # these tests only read them

FPN_2FC = ["mask_rcnn_r50_fpn_moco.py", "mask_rcnn_r50_fpn_moco_2x.py"]
MINI_COCO = {
    "mask_rcnn_r50_fpn_4conv1fc_mini_coco_5pct.py": (0.05, 5_500, [4_000, 5_000]),
    "mask_rcnn_r50_fpn_4conv1fc_mini_coco_10pct.py": (0.1, 10_000, [7_000, 9_000]),
}
FROZEN = "mask_rcnn_r50_fpn_4conv1fc_frozen.py"
FPN_4CONV1FC = [
    "mask_rcnn_r50_fpn_4conv1fc.py",
    "mask_rcnn_r50_fpn_4conv1fc_2x.py",
    "mask_rcnn_r50_fpn_4conv1fc_3x.py",
    "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5.py",
    "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5_2x.py",
    "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5_3x.py",
    FROZEN,
    *MINI_COCO,
]
INFOMIN = ["mask_rcnn_r50_fpn_infomin.py"]
C4 = [f"mask_rcnn_r50_c4_moco{end}.py" for end in ("", "_2x", "_wd2.5e-5", "_wd2.5e-5_2x")]
VOC_C4 = ["faster_rcnn_r50_c4_voc.py", "faster_rcnn_r50_c4_voc_wd2.5e-5.py"]
VOC = [*VOC_C4, "faster_rcnn_r50_fpn_voc.py"]
#: See test_transformer_configs.py.
TRANSFORMERS = [
    f"mask_rcnn_{name}.py" for name in ("swin_t_fpn", "swin_b_fpn", "convnext_t_fpn", "vitdet_b")
]
FPN = FPN_2FC + FPN_4CONV1FC + INFOMIN
DENSE = ["retinanet_r50_fpn.py", "retinanet_r50_fpn_2x.py", "fcos_r50_fpn.py"]
KEYPOINTS = ["keypoint_rcnn_r50_fpn.py", "keypoint_rcnn_r50_fpn_2x.py"]
CASCADE, PANOPTIC = "cascade_mask_rcnn_r50_fpn.py", "panoptic_fpn_r50.py"
CITYSCAPES = "mask_rcnn_r50_fpn_cityscapes.py"
LVIS = ["mask_rcnn_r50_fpn_lvis.py", "mask_rcnn_r50_fpn_4conv1fc_wd2.5e-5_lvis.py"]
OTHERS = [*DENSE, *KEYPOINTS, CASCADE, PANOPTIC, CITYSCAPES, *LVIS]
ALL = FPN + C4 + VOC + OTHERS
#: Mask R-CNN config -> that of the same detector for boxes without masks.
BOXES_ONLY = {name: name.replace("mask_rcnn", "faster_rcnn") for name in FPN + C4}
del BOXES_ONLY[FROZEN]  # the override train.freeze does the same
SHAPES = "mask_rcnn_r18_fpn_shapes.py"
BOXES_ONLY[SHAPES] = "faster_rcnn_r18_fpn_shapes.py"


@functools.cache
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


def lr_of(name: str) -> float:
    return 0.01 if name in DENSE or name == CITYSCAPES else 0.02


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
            "model.num_classes=7" if name in DENSE else "model.roi_heads.num_classes=7",
            "optimizer.lr=0.005",
            "dataloader.train.total_batch_size=4",
            "train.init_checkpoint=weights.pth",
        ],
    )
    assert (again.optimizer.lr, again.dataloader.train.total_batch_size) == (0.005, 4)
    assert again.train.init_checkpoint == "weights.pth"
    with torch.device("meta"):
        model = instantiate(again.model)
    if name in DENSE:
        assert isinstance(model, RetinaNet | FCOS)
        assert model.head.cls_score.out_channels == 7 * (9 if "retina" in name else 1)
    else:
        assert isinstance(model, GeneralizedRCNN)
        predictor = model.roi_heads.box_predictor
        for one in predictor if name == CASCADE else [predictor]:
            assert one.cls_score.out_features == 8

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
    assert getattr(model, "input_format", "RGB") == "RGB"
    for loader in (cfg.dataloader.train, cfg.dataloader.test):
        assert loader.mapper.image_format == "RGB"
    # nothing frozen, the stride in the 3x3
    assert all(p.requires_grad for p in model.parameters())
    body = getattr(model.backbone, "bottom_up", model.backbone)
    assert {m.__class__ for m in norms(body)} == {nn.SyncBatchNorm}
    assert (body.res3[0].conv1.stride, body.res3[0].conv2.stride) == ((1, 1), (2, 2))
    # no decay of norms, precise BN over 200 batches
    batch = 8 if name == CITYSCAPES else 16
    assert cfg.dataloader.train.total_batch_size == cfg.train.base_batch_size == batch
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (lr_of(name), 0.9)
    assert cfg.optimizer.params.weight_decay_norm == 0.0
    assert cfg.train.precise_bn == {"enabled": True, "num_iter": 200}
    batch_norms = [m for m in norms(model) if not isinstance(m, nn.GroupNorm)]
    assert len(get_bn_modules(model)) == len(batch_norms)
    assert cfg.lr_multiplier.max_iter == cfg.train.max_iter
    test_size = cfg.dataloader.test.mapper.augmentations[0]
    expected = (1024, 2048) if name == CITYSCAPES else (800, 1333)
    assert (test_size.short_edge_length, test_size.max_size) == expected


@pytest.mark.parametrize("name", ALL)
def test_schedule(name):
    cfg, lr = get_config(f"detection/{name}"), lr_of(name)
    warmup = 1_000
    if name == CITYSCAPES:
        assert (cfg.train.max_iter, list(cfg.lr_multiplier.steps)) == (24_000, [18_000])
        found = learning_rates(cfg, [0, 1_000, 17_999, 18_001, 23_999])
        assert found == pytest.approx([lr / 1_000, lr, lr, lr / 10, lr / 10], rel=1e-6)
        return
    if name in MINI_COCO:
        _, length, steps = MINI_COCO[name]
    elif name in VOC:
        length, steps, warmup = 24_000, [18_000, 22_000], 100
    elif "_2x" in name or name == LVIS[0]:
        length, steps = 180_000, [120_000, 160_000]
    elif "_3x" in name:
        length, steps = 270_000, [210_000, 250_000]
    else:
        length, steps = 90_000, [60_000, 80_000]
    assert cfg.train.max_iter == length
    first, second = steps
    at = [0, warmup, first - 1, first + 1, second - 1, second + 1, length - 1]
    expected = [lr * factor for factor in (0.001, 1, 1, 0.1, 0.1, 0.01, 0.01)]
    assert learning_rates(cfg, at) == pytest.approx(expected, rel=1e-6)
    half = learning_rates(cfg, [warmup // 2])[0]
    assert half == pytest.approx((0.001 * lr + lr) / 2, rel=1e-6)


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


@pytest.mark.parametrize("name", C4 + VOC_C4)
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


@pytest.mark.parametrize("name", VOC)
def test_voc_data(name):
    cfg = get_config(f"detection/{name}")
    assert not build(name).roi_heads.mask_on
    train, test = cfg.dataloader.train, cfg.dataloader.test
    assert list(train.dataset.names) == ["voc_2007_trainval", "voc_2012_trainval"]
    assert test.dataset.names == cfg.dataloader.evaluator.dataset_name == "voc_2007_test"
    size = train.mapper.augmentations[0]
    assert list(size.short_edge_length) == list(range(480, 801, 32))
    assert cfg.model.roi_heads.num_classes == 20
    assert cfg.model.roi_heads.box_predictor.num_classes == 20


@pytest.mark.parametrize("name", OTHERS)
def test_fpn_of_other_detectors(name):
    backbone = build(name).backbone
    assert parameters(backbone.bottom_up) == 23_508_032
    fpn = [m for n, m in backbone.named_modules() if n.startswith("fpn_") and "norm" in n]
    levels = 3 if name in DENSE else 4
    assert len(fpn) == 2 * levels and {m.__class__ for m in fpn} == {nn.SyncBatchNorm}


@pytest.mark.parametrize("name", DENSE)
def test_dense_detectors(name):
    cfg, model = get_config(f"detection/{name}"), build(name)
    assert not cfg.dataloader.train.mapper.use_instance_mask
    assert model.num_classes == 80
    assert set(model.backbone.output_shape()) == {"p3", "p4", "p5", "p6", "p7"}
    # class tower: 4 * (9 * 256 * 256 + 256); FCOS has a group norm after each convolution
    tower = 2_360_320 + (4 * 512 if "fcos" in name else 0)
    assert parameters(model.head.cls_subnet) == tower


def test_cascade_detector():
    cfg, model = get_config(f"detection/{CASCADE}"), build(CASCADE)
    assert [parameters(head) for head in model.roi_heads.box_head] == [13_895_680] * 3
    assert model.roi_heads.mask_on
    assert model.proposal_generator.post_nms_topk == {True: 2_000, False: 1_000}
    assert cfg.dataloader.train.mapper.use_instance_mask


@pytest.mark.parametrize("name", KEYPOINTS)
def test_keypoint_detectors(name):
    cfg, heads = get_config(f"detection/{name}"), build(name).roi_heads
    train = cfg.dataloader.train
    assert (heads.num_classes, heads.mask_on, heads.keypoint_on) == (1, False, True)
    assert heads.keypoint_head.score_lowres.out_channels == 17
    assert train.dataset.names == "keypoints_coco_2017_train" and train.dataset.min_keypoints == 1
    mapper = instantiate(train.mapper)
    # nose, then left and right eye, ear, ...: neighbours are swapped
    swapped = [0] + [i + 1 if i % 2 else i - 1 for i in range(1, 17)]
    assert list(mapper.keypoint_hflip_indices) == swapped
    assert mapper.use_keypoint and not mapper.use_instance_mask


def test_panoptic_detector():
    cfg, model = get_config(f"detection/{PANOPTIC}"), build(PANOPTIC)
    assert isinstance(model, PanopticFPN)
    assert model.sem_seg_head.predictor.out_channels == 54  # all things are one class
    train, test = cfg.dataloader.train.dataset, cfg.dataloader.test.dataset
    assert train.names == "coco_2017_train_panoptic_separated" and not train.filter_empty
    assert test.names == "coco_2017_val_panoptic_separated"
    assert len(MetadataCatalog.get(train.names).stuff_classes) == 54


@pytest.mark.parametrize("name", LVIS)
def test_lvis_detectors(name):
    cfg, heads = get_config(f"detection/{name}"), build(name).roi_heads
    assert heads.box_predictor.cls_score.out_features == 1_204
    assert heads.box_predictor.test_score_thresh == 1e-4
    assert heads.box_predictor.test_topk_per_image == 300
    assert len(norms(heads)) == (8 if "4conv1fc" in name else 0)
    sampler = cfg.dataloader.train.sampler
    assert sampler.repeat_factors.repeat_thresh == 0.001
    assert len(MetadataCatalog.get(cfg.dataloader.train.dataset.names).thing_classes) == 1_203


def test_cityscapes_data():
    cfg = get_config(f"detection/{CITYSCAPES}")
    size = cfg.dataloader.train.mapper.augmentations[0]
    assert list(size.short_edge_length) == list(range(800, 1_025, 32))
    assert (size.sample_style, size.max_size) == ("choice", 2_048)
    names = MetadataCatalog.get(cfg.dataloader.train.dataset.names).thing_classes
    assert len(names) == cfg.model.roi_heads.num_classes == 8


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
