"""A network's layout, from its tensors under common names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from region_pretrain.errors import UserError

BOX, MASK, RPN = "roi_heads.box_head", "roi_heads.mask_head", "proposal_generator.rpn_head"
FC_DIM = 1024  # of a box head whose fully connected layers are not in the file
_DEPTHS = {
    (2, 2, 2, 2): (18, False),
    (3, 4, 6, 3): (50, True),
    (3, 4, 23, 3): (101, True),
    (3, 8, 36, 3): (152, True),
}


def trunk_kind(tensors: Mapping[str, Tensor]) -> str | None:
    """``"ResNet"``, ``"Swin"``, ``"ViT"``, or None."""
    anchors = {
        "ResNet": "stem.conv1.weight",
        "Swin": "layers.0.blocks.0.attn.qkv.weight",
        "ViT": "blocks.0.attn.qkv.weight",
    }
    return next((kind for kind, name in anchors.items() if name in tensors), None)


def is_bottleneck(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a ResNet's blocks have three convolutions."""
    return "res2.0.conv3.weight" in tensors


def is_fcos(tensors: Iterable[str]) -> bool:
    """Whether a dense head, which has RetinaNet's names, is FCOS's."""
    return "head.ctrness.weight" in tensors


def numbered(tensors: Iterable[str], pattern: str) -> list[int]:
    """The sorted numbers that a pattern's group has in names."""
    return sorted({int(m[1]) for m in (re.fullmatch(pattern, name) for name in tensors) if m})


def rows(tensors: Mapping[str, Tensor], name: str) -> int:
    """The first dimension of a tensor; 0 if it is missing."""
    return tensors[name].shape[0] if name in tensors else 0


class ResNetLayout:
    """The arguments of a ResNet's constructor, from its tensors.

    Attributes:
        bottleneck: whether the blocks have three convolutions.
        block: ``"Bottleneck"`` or ``"BasicBlock"``.
        blocks, widths, planes: number of blocks, output channels and base channels per stage.
        stem: output channels of the stem.
        groups, group_width: ResNeXt's groups, and their channels in the first stage; 1 and 64 for a
            ResNet.
        batch_norm: whether the norms have running statistics.

    Raises:
        UserError: the first residual stage is missing.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        if "res2.0.conv1.weight" not in tensors:
            raise UserError("the ResNet is incomplete: it has a stem, but no first residual stage")
        self.bottleneck = is_bottleneck(tensors)
        last = 3 if self.bottleneck else 2
        stages = numbered(tensors, r"res(\d)\.0\.conv1\.weight")
        self.blocks = [
            len(numbered(tensors, rf"res{stage}\.(\d+)\.conv1\.weight")) for stage in stages
        ]
        self.widths = [rows(tensors, f"res{stage}.0.conv{last}.weight") for stage in stages]
        self.stem = rows(tensors, "stem.conv1.weight")
        inner = rows(tensors, "res2.0.conv1.weight")
        self.groups = inner // tensors["res2.0.conv2.weight"].shape[1] if self.bottleneck else 1
        self.planes = [width // 4 if self.bottleneck else width for width in self.widths]
        self.group_width = 64 * inner // (self.groups * self.planes[0]) if self.bottleneck else 64
        self.block = "Bottleneck" if self.bottleneck else "BasicBlock"
        self.batch_norm = "stem.conv1.norm.running_mean" in tensors

    @property
    def depth(self) -> int | None:
        """The usual name of the blocks, such as 50; None if they have none."""
        depth, bottleneck = _DEPTHS.get(tuple(self.blocks), (None, False))
        if depth == 50 and not self.bottleneck:
            return 34
        return depth if bottleneck == self.bottleneck else None


def box_layers(tensors: Mapping[str, Tensor]) -> tuple[list[int], list[int]]:
    """Output widths of a box head's convolutions and fully connected layers."""
    convs, fcs = (
        [rows(tensors, f"{BOX}.{kind}{i}.weight") for i in numbered(tensors, pattern)]
        for kind, pattern in (
            ("conv", rf"{re.escape(BOX)}\.conv(\d+)\.weight"),
            ("fc", rf"{re.escape(BOX)}\.fc(\d+)\.weight"),
        )
    )
    return convs, fcs
