"""Small networks whose weights are exported, and what the tests compare."""

from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem, BottleneckBlock, ResNet
from torch import nn

from region_pretrain.convert.facts import IMAGENET, Facts

STAGES = ("res2", "res3", "res4", "res5")
RGB = [
    "INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53],
    "MODEL.PIXEL_STD", [58.395, 57.12, 57.375], "MODEL.DEVICE", "cpu",
]  # fmt: skip
#: Mask R-CNN R18-FPN with 32 channels.
SMALL = [
    *RGB, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "MODEL.MASK_ON", True,
    "MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone", "MODEL.BACKBONE.FREEZE_AT", 0,
    "MODEL.RESNETS.OUT_FEATURES", list(STAGES), "MODEL.RESNETS.DEPTH", 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.NORM", "BN",
    "MODEL.FPN.IN_FEATURES", list(STAGES), "MODEL.FPN.OUT_CHANNELS", 32,
    "MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256], [512]],
    "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_HEADS.NUM_CLASSES", 5,
    "MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NUM_FC", 2,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 64, "MODEL.ROI_BOX_HEAD.CONV_DIM", 32,
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7,
    "MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NUM_CONV", 4,
    "MODEL.ROI_MASK_HEAD.CONV_DIM", 32, "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14,
]  # fmt: skip
NORMED = [
    "MODEL.FPN.NORM", "BN", "MODEL.ROI_BOX_HEAD.NUM_CONV", 4, "MODEL.ROI_BOX_HEAD.NUM_FC", 1,
    "MODEL.ROI_BOX_HEAD.NORM", "BN", "MODEL.ROI_MASK_HEAD.NORM", "BN",
]  # fmt: skip
RETINA = [
    *SMALL, "MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.MASK_ON", False,
    "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES", list(STAGES[1:]), "MODEL.FPN.IN_FEATURES", list(STAGES[1:]),
    "MODEL.RETINANET.NUM_CLASSES", 5,
    "MODEL.ANCHOR_GENERATOR.SIZES",
    [[x, x * 2 ** (1 / 3), x * 2 ** (2 / 3)] for x in (32, 64, 128, 256, 512)],
]  # fmt: skip


def randomise(model: nn.Module) -> nn.Module:
    """Give every tensor a value of its own, so that none can be confused with another."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "norm.weight")):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith(("running_mean", "bias")):
            tensor.normal_(0, 0.1)
        elif name.endswith(("pos_embed", "bias_table", "logits.weight")):
            tensor.normal_(0, 0.1)
    return model.eval()


def from_yacs(*settings) -> nn.Module:
    cfg = get_cfg()
    cfg.merge_from_list([item for part in settings for item in part])
    return randomise(build_model(cfg))


def bottlenecks(groups=1, stride_in_1x1=False, norm="BN", widths=(64, 128, 256, 512)) -> ResNet:
    """One block per stage."""
    channels = [64, *(4 * width for width in widths)]
    stages = [
        ResNet.make_stage(
            BottleneckBlock,
            1,
            in_channels=channels[i],
            out_channels=channels[i + 1],
            bottleneck_channels=width,
            num_groups=groups,
            norm=norm,
            stride_in_1x1=stride_in_1x1,
            stride_per_block=[1 if i == 0 else 2],
        )
        for i, width in enumerate(widths)
    ]
    return randomise(ResNet(BasicStem(norm=norm), stages, out_features=list(STAGES)))


def save(path: Path, model: nn.Module | dict, facts: Facts | None = IMAGENET) -> str:
    state = model if isinstance(model, dict) else model.state_dict()
    torch.save({"model": state, **({"detector": facts.to_dict()} if facts else {})}, path)
    return str(path)


def built(lines: list[str]) -> nn.Module:
    """The network that the lines for torchvision or timm construct."""
    scope: dict = {}
    exec("\n".join(lines), scope)
    return scope["model"].eval()


def comments(lines: list[str], start: str) -> list[str]:
    return [line for line in lines if line.startswith(f"# {start}")]


def images(seed=1, side=64) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(seed))


def trunk_features(model: nn.Module, inputs: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for i in range(1, 5):
        getattr(model, f"layer{i}").register_forward_hook(lambda m, a, out: found.append(out))
    model(inputs)
    return found


def assert_same(theirs, ours, within: float = 0.0) -> None:
    theirs, ours = list(theirs), list(ours)
    assert len(theirs) == len(ours) > 0
    for a, b in zip(theirs, ours, strict=True):
        assert b.abs().max() > 0.01
        assert (a - b).abs().max().item() <= within


def mmdet_names() -> dict[str, tuple[int, ...]]:
    """Names and shapes of mmdetection 3.3's Mask R-CNN R18-FPN with 4conv1fc head and BN."""
    lines = (Path(__file__).parent / "mmdet_mask_rcnn_r18.txt").read_text().splitlines()
    return {name: tuple(map(int, shape)) for name, *shape in map(str.split, lines)}
