"""Frozen modules stay bit-equal; everything else is trained."""

import pickle

import pytest
import torch
from detectron2.config import instantiate
from detectron2.engine.hooks import get_bn_modules
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from narrow_detector import build, detector_config, state
from timm.layers import BatchNormAct2d
from timm.layers import convert_sync_batchnorm as timm_sync
from timm.models.vision_transformer import Attention
from tiny_run import make_config, make_detection_config
from torch import nn

from region_pretrain.config import get_config
from region_pretrain.engine.finetune import do_evaluate, do_train
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.trainable import freeze
from region_pretrain.errors import UserError
from region_pretrain.modeling.given import modes_kept
from region_pretrain.modeling.norms import use_local_batchnorm

ALL_BUT_PREDICTORS = [
    "backbone",
    "proposal_generator.rpn_head.conv",
    "roi_heads.box_head",
    "roi_heads.mask_head.mask_fcn*",
]
PREDICTORS = {
    "proposal_generator.rpn_head.objectness_logits",
    "proposal_generator.rpn_head.anchor_deltas",
    "roi_heads.box_predictor.cls_score",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.mask_head.deconv",
    "roi_heads.mask_head.predictor",
}


def trainable_detector() -> nn.Module:
    config = detector_config()
    stages = config.backbone.bottom_up.stages
    # With equal widths, a block of stride 2 has no shortcut that fits.
    stages[2].out_channels = stages[3].in_channels = 24
    torch.manual_seed(0)
    return instantiate(config)


def inputs() -> list[dict]:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 4:40, 4:40], masks[1, 10:60, 20:60] = True, True
    targets = Instances((64, 64), gt_classes=torch.tensor([0, 2]), gt_masks=BitMasks(masks))
    targets.gt_boxes = Boxes(torch.tensor([[4.0, 4, 40, 40], [20, 10, 60, 60]]))
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    return [{"image": image, "instances": targets, "height": 64, "width": 64}]


def modules_of(names: set[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("patterns", "frozen"),
    [
        (["backbone.bottom_up"], ("backbone.bottom_up.",)),
        (["backbone"], ("backbone.",)),
        (["backbone", "roi_heads.box_head"], ("backbone.", "roi_heads.box_head.")),
        (ALL_BUT_PREDICTORS, None),
    ],
)
def test_frozen_tensors_stay_and_all_others_move(patterns, frozen):
    model = trainable_detector()
    freeze(model, patterns)
    model.train()
    before = state(model, "")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    torch.manual_seed(1)
    for _ in range(2):
        model.eval()  # as an evaluation does
        model.train()
        with EventStorage():
            sum(model(inputs()).values()).backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    if frozen is None:
        assert modules_of(changed) == PREDICTORS
    else:
        assert not any(name.startswith(frozen) for name in changed)
        rest = {name for name, p in model.named_parameters() if not name.startswith(frozen)}
        assert rest <= changed
    # Precise batch norm recomputes the statistics of trained norms only.
    norms = 8 if "backbone" not in patterns else 0
    assert len(get_bn_modules(model)) == norms


def test_dropout_of_frozen_modules_is_off():
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)), nn.Linear(4, 2))
    freeze(model, ["0"])
    model.train()
    x = torch.ones(8, 4)
    assert torch.equal(model[0](x), model[0][0](x)) and model[1].training


def test_norms_and_attentions_that_contain_others_are_off():
    """timm's norms include dropout and activation."""
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 8, 1), BatchNormAct2d(8)), nn.Linear(8, 2), nn.Sequential()
    )
    attention = Attention(8, num_heads=2, attn_drop=0.5)
    model[2].append(attention)
    freeze(model, ["0", "2"])
    model.train()
    before = state(model, "")
    model[0](torch.randn(4, 3, 5, 5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model[0][1].training and not attention.training and model[1].training


def test_a_pattern_without_a_module_and_nothing_to_train_are_refused():
    with pytest.raises(UserError, match="'backbone.botom_up' matches no .* backbone.bottom_up"):
        freeze(build(), ["backbone", "backbone.botom_up"])
    with pytest.raises(UserError, match="'x' matches no .*has backbone, proposal_generator, roi_h"):
        freeze(build(), ["x"])
    with pytest.raises(UserError, match="leaves nothing to train"):
        freeze(build(), ["*"])


def test_a_run_with_a_frozen_trunk(tmp_path):
    start = tmp_path / "start" / "model_final.pth"
    do_train(make_detection_config(tmp_path / "start", max_iter=2))
    cfg = make_detection_config(tmp_path / "run", init_checkpoint=str(start), freeze=["backbone"])
    results = do_train(cfg)
    a, b = (
        torch.load(file, weights_only=True)["model"]
        for file in (start, tmp_path / "run" / "model_final.pth")
    )
    same = {name: torch.equal(a[name], b[name]) for name in a}
    assert same == {name: name.startswith("backbone.") for name in a} and len(a) == 9
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "frozen: backbone; 5 of 29 parameters are trained" in log
    assert "freezes layers without weights" not in log
    cfg.train.init_checkpoint = str(tmp_path / "run" / "model_final.pth")
    assert do_evaluate(cfg)["bbox"]["AP"] == results["bbox"]["AP"]


def test_pre_training_does_not_freeze(tmp_path):
    with pytest.raises(UserError, match="is for fine-tuning"):
        do_pretrain(make_config(tmp_path, max_iter=1, freeze=["backbone"]))


def test_the_shipped_probe():
    cfg = get_config("detection/mask_rcnn_r50_fpn_4conv1fc_frozen.py")
    assert list(cfg.train.freeze) == ["backbone", "roi_heads.box_head"]
    with torch.device("meta"):
        model = instantiate(cfg.model)
    freeze(model, cfg.train.freeze)
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"rpn_head", "box_predictor", "mask_head"}


def test_a_frozen_layer_is_the_callers_own_again_afterwards():
    model = trainable_detector()
    norm = next(m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d))
    norm.eval()  # the caller's choice
    modes = [m.training for m in model.modules()]
    with modes_kept(model):
        freeze(model, ["backbone"])
        assert not any(m.training for m in model.train().modules() if "train" in m.__dict__)
    assert [m.training for m in model.modules()] == modes
    assert not any("train" in m.__dict__ for m in model.modules())
    model.train()
    assert norm.training
    pickle.dumps(model)


def test_norms_that_a_method_made_local_are_synchronised_again():
    model = nn.Sequential(nn.SyncBatchNorm(4), timm_sync(BatchNormAct2d(4)))
    kinds = [type(module) for module in model.modules()]
    with modes_kept(model):
        use_local_batchnorm(model)
        assert type(model[0]) is nn.BatchNorm2d and model[1]._forward_hooks
    assert [type(module) for module in model.modules()] == kinds
    assert not model[1]._forward_hooks
