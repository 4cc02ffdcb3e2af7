"""Detection configs with transformers and ConvNeXts, and the recipe that pre-trains them."""

from __future__ import annotations

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import LazyConfig, instantiate
from detectron2.modeling.backbone.vit import get_vit_lr_decay_rate
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage

from region_pretrain.config import CONFIG_ROOT, changed_keys, get_config, load_config
from region_pretrain.engine.build import build_optimizer
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.timm_backbone import TimmBackbone

SWIN_T, SWIN_B = "mask_rcnn_swin_t_fpn.py", "mask_rcnn_swin_b_fpn.py"
CONVNEXT, VITDET = "mask_rcnn_convnext_t_fpn.py", "mask_rcnn_vitdet_b.py"
TRANSFORMERS = [SWIN_T, SWIN_B, CONVNEXT, VITDET]
#: Config -> (parameters of the trunk, overrides that make it tiny)
FACTS = {
    # torchvision's swin_t: 28,288,354; without classifier 768 * 1000 + 1000, norm 2 * 768; and the
    # norms of four maps, 2 * (96 + 192 + 384 + 768)
    SWIN_T: (
        28_288_354 - 769_000 - 1_536 + 2_880,
        "embed_dim=12 depths=[1,1,1,1] num_heads=[1,1,2,2]",
    ),
    SWIN_B: (
        87_768_224 - 1_025_000 - 2_048 + 3_840,
        "embed_dim=12 depths=[1,1,1,1] num_heads=[1,1,2,2]",
    ),
    # torchvision's convnext_tiny: 28,589,128; without classifier and its norm
    CONVNEXT: (28_589_128 - 769_000 - 1_536, "+depths=[1,1,1,1] +dims=[8,8,16,16]"),
    VITDET: (None, "embed_dim=24 depth=2 num_heads=2 img_size=128 window_block_indexes=[0]"),
}


def build(name: str):
    with on_meta_device():
        return instantiate(get_config(f"detection/{name}").model)


def trunk_key(name: str) -> str:
    return "net" if name == VITDET else "bottom_up"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_saved_read_back_and_built(name, tmp_path):
    cfg = get_config(f"detection/{name}")
    assert set(cfg) == {"model", "dataloader", "optimizer", "lr_multiplier", "train"}
    saved = tmp_path / "config.yaml"
    LazyConfig.save(cfg, str(saved))
    assert not (tmp_path / "config.yaml.pkl").exists()
    again = LazyConfig.load(str(saved))
    assert changed_keys(cfg, again) == {}
    with on_meta_device():
        model = instantiate(again.model)
    trunk = getattr(model.backbone, trunk_key(name))
    count, _ = FACTS[name]
    if count is not None:
        assert sum(p.numel() for p in trunk.parameters()) == count
    assert [*model.backbone.output_shape()] == ["p2", "p3", "p4", "p5", "p6"]
    assert model.input_format == cfg.dataloader.train.mapper.image_format == "RGB"
    assert list(cfg.model.pixel_mean) == [123.675, 116.28, 103.53]
    assert cfg.dataloader.test.mapper.image_format == "RGB"
    assert cfg.train.max_iter == cfg.lr_multiplier.max_iter
    assert cfg.train.base_batch_size == cfg.dataloader.train.total_batch_size
    instantiate(again.dataloader.train.mapper)
    instantiate(again.dataloader.test.mapper)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_optimiser_and_schedule(name):
    cfg, model = get_config(f"detection/{name}"), build(name)
    optimizer = build_optimizer(cfg, model, cfg.optimizer.lr)
    assert isinstance(optimizer, torch.optim.AdamW)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len([*model.parameters()])
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    layers = {SWIN_T: 0, SWIN_B: 0, CONVNEXT: 18, VITDET: 12}[name]
    decay = {CONVNEXT: 0.95, VITDET: 0.7}.get(name, 1.0)
    powers = [1e-4 * decay**i for i in range(layers + 2 if layers else 1)]
    assert sorted(set(rates.values())) == pytest.approx(powers[::-1])
    assert {g["weight_decay"] for g in optimizer.param_groups} == {
        0.0,
        0.1 if name == VITDET else 0.05,
    }
    length, steps, warmup = (90_000, (60_000, 80_000), 1_000)
    if name == VITDET:
        length, steps, warmup = (184_375, (163_889, 177_546), 250)
    multiplier = instantiate(cfg.lr_multiplier)
    at = [0, warmup, steps[0] - 1, steps[0] + 1, steps[1] + 1, length - 1]
    found = [multiplier(i / length) for i in at]
    assert found == pytest.approx([0.001, 1, 1, 0.1, 0.01, 0.01], rel=1e-6)


def test_vitdet_is_detectron2s():
    cfg, model = get_config(f"detection/{VITDET}"), build(VITDET)
    stock = model_zoo.get_config("common/models/mask_rcnn_vitdet.py").model
    assert changed_keys(stock, cfg.model) == {}
    optimizer = build_optimizer(cfg, model, 1e-4)
    rates = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == 1e-4 * get_vit_lr_decay_rate(name, 0.7, 12), name
    train, test = cfg.dataloader.train, cfg.dataloader.test
    flip, resize, crop = train.mapper.augmentations
    assert (resize.min_scale, resize.max_scale, resize.target_height) == (0.1, 2.0, 1024)
    assert tuple(crop.crop_size) == (1024, 1024) and not crop.pad and flip.horizontal
    assert train.mapper.recompute_boxes and train.total_batch_size == 64
    size = test.mapper.augmentations[0]
    assert (size.short_edge_length, size.max_size) == (1024, 1024)


def test_drop_rates():
    for name, rate in ((SWIN_T, 0.1), (SWIN_B, 0.3), (CONVNEXT, 0.2), (VITDET, 0.1)):
        drops = [m.drop_prob for m in build(name).modules() if type(m).__name__ == "DropPath"]
        assert max(drops) == pytest.approx(rate) and len(drops) >= 11
    assert isinstance(build(CONVNEXT).backbone.bottom_up, TimmBackbone)


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_step_trains_every_parameter(name):
    """Of a tiny variant: none is left without a gradient, which DDP would wait for."""
    key = trunk_key(name)
    place = f"model.backbone.{key}."
    overrides = [
        f"+{place}{item[1:]}" if item[0] == "+" else place + item for item in FACTS[name][1].split()
    ]
    overrides += [f"{place}drop_path_rate=0.0", "model.roi_heads.num_classes=3"]
    overrides += ["model.roi_heads.batch_size_per_image=16"]
    if name == VITDET:
        overrides += ["model.backbone.square_pad=128"]
    cfg = load_config(str(CONFIG_ROOT / "detection" / name), overrides)
    torch.manual_seed(0)
    model = instantiate(cfg.model).train()
    optimizer = build_optimizer(cfg, model, cfg.optimizer.lr)
    objects = Instances((128, 128))
    objects.gt_boxes = Boxes(torch.tensor([[10.0, 10, 70, 60], [60, 40, 120, 120]]))
    objects.gt_classes = torch.tensor([0, 2])
    masks = torch.zeros(2, 128, 128, dtype=torch.bool)
    masks[0, 10:60, 10:70] = masks[1, 40:120, 60:120] = True
    objects.gt_masks = BitMasks(masks)
    image = torch.randint(256, (3, 128, 128), dtype=torch.uint8)
    batch = [{"image": image, "instances": objects}]
    with EventStorage():
        losses = model(batch)
    assert set(losses) == {
        "loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls", "loss_rpn_loc"
    }  # fmt: skip
    sum(losses.values()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    assert [n for n, p in model.named_parameters() if torch.equal(p, before[n])] == []


def test_the_recipe_for_pretraining():
    recipe = get_config("common/adamw_pretrain.py")
    train = get_config("common/train.py").train
    train.epochs = 100
    train.merge_with(recipe.train)
    assert train.clip_grad == {"enabled": True, "max_norm": 3.0, "max_value": None}
    assert train.amp == {"enabled": True, "dtype": "bfloat16"} and train.base_batch_size == 256
    assert (recipe.optimizer.lr, recipe.optimizer.weight_decay) == (5e-4, 0.05)
    recipe.lr_multiplier.epochs = 100
    multiplier = instantiate(recipe.lr_multiplier)
    found = [multiplier(epoch / 100) for epoch in (0, 5, 10, 55, 100)]
    assert found == pytest.approx([0, 0.5, 1, 0.505, 0.01], abs=1e-6)
    # importing it does not change the detection configs' optimiser
    assert get_config("common/optim.py").adamw.lr == 1e-4
