"""The Python lines that build the network of exported weights in timm."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from region_pretrain.convert.facts import FROZEN, Facts
from region_pretrain.convert.layout import ResNetLayout, numbered, trunk_kind
from region_pretrain.convert.lines import pixel_lines, stride_lines
from region_pretrain.errors import UserError
from region_pretrain.modeling.init import on_meta_device
from region_pretrain.modeling.timm_backbone import create_timm_model


def own_lines(facts: Facts, state: Sequence[str]) -> list[str]:
    """For the trunk of a ``TimmBackbone``.

    Args:
        facts: what the weights presume.
        state: timm's names that are filled.
    """
    lines = ["import timm", *pixel_lines(facts)]
    if facts.timm is None:
        return [*lines, "# build the timm model that the detector has: the file lacks its name"]
    options = dict(facts.timm)
    name = options.pop("name")
    arguments = [repr(name), *(f"{key}={value!r}" for key, value in options.items())]
    with on_meta_device():
        complete = create_timm_model(name, **options).state_dict()
    absent = dict.fromkeys(
        key.rpartition(".")[0] or key
        for key in complete
        if key not in state and not key.endswith(".num_batches_tracked")  # no weight
    )
    not_filled = [f"# not filled: {', '.join(absent)}"] if absent else []
    return [
        *lines,
        f"model = timm.create_model({', '.join(arguments)}, num_classes=0)",
        *not_filled,
    ]


def check_plain_resnet(path: str, arguments: Mapping[str, Any], to: str) -> None:
    """Refuse a network of timm that other libraries would compute differently under equal names.

    Pooling against aliasing, average pooling in shortcuts, attention and dilation have no tensors
    that show them, or tensors that would be left out.

    Args:
        path: the file, for the message.
        arguments: of ``timm.create_model``.
        to: the other library.

    Raises:
        UserError: it is not a plain ResNet or ResNeXt.
    """
    options = dict(arguments)
    name = options.pop("name")
    with on_meta_device():
        model = create_timm_model(name, **options)
    kinds = {type(module).__name__ for module in model.modules()}
    kinds -= {"DropBlock2d", "DropPath", "Identity", "Sequential", "SelectAdaptivePool2d"}
    kinds -= {
        "AdaptiveAvgPool2d",
        "BatchNorm2d",
        "Conv2d",
        "Flatten",
        "FastAdaptiveAvgPool",
        "MaxPool2d",
        "ReLU",
    }
    others = sorted(kinds - {"ResNet", "BasicBlock", "Bottleneck"})
    strided = any(c.dilation != (1, 1) for c in model.modules() if isinstance(c, nn.Conv2d))
    if others or strided or "ResNet" not in kinds:
        reason = ", ".join(others) or ("dilation" if strided else "no ResNet")
        raise UserError(
            f"{path} is timm's {name} ({reason}), which {to} does not have: its features would be "
            "wrong. Use --to timm"
        )


def timm_lines(tensors: Mapping[str, Tensor], facts: Facts, state: Sequence[str]) -> list[str]:
    lines = ["import timm", *pixel_lines(facts)]
    kind = trunk_kind(tensors)
    if kind == "ResNet":
        net = ResNetLayout(tensors)
        norm = "" if net.batch_norm else ", norm_layer=timm.layers.GroupNorm"
        lines += stride_lines(facts, net)
        if facts.norm == FROZEN:
            lines.append("# its norms were fixed: timm.layers.freeze_batch_norm_2d keeps them so")
        return [
            *lines,
            *(
                [f"# timm's ResNet has no stem of {net.stem} channels: build your own"]
                if net.stem != 64
                else []
            ),
            "from timm.models.resnet import BasicBlock, Bottleneck, ResNet",
            f"model = ResNet({net.block}, {net.blocks}, num_classes=0, cardinality={net.groups}, "
            f"base_width={net.group_width}, channels={net.planes}{norm})",
        ]
    width, _, patch, _ = tensors["patch_embed.proj.weight"].shape
    if kind == "Swin":
        stages = numbered(tensors, r"layers\.(\d)\.blocks\.0\.attn\.qkv\.weight")
        depths = [
            len(numbered(tensors, rf"layers\.{i}\.blocks\.(\d+)\.attn\.qkv\.weight"))
            for i in stages
        ]
        tables = [
            tensors[f"layers.{i}.blocks.0.attn.relative_position_bias_table"].shape for i in stages
        ]
        window = (round(tables[0][0] ** 0.5) + 1) // 2
        return [
            *lines,
            "from timm.models.swin_transformer import SwinTransformer",
            f"model = SwinTransformer(patch_size={patch}, embed_dim={width}, depths={depths}, "
            f"num_heads={[heads for _, heads in tables]}, window_size={window}, num_classes=0, "
            "strict_img_size=False, always_partition=True)",
            "# not filled: norm, the norm of the last stage",
        ]
    depth = len(numbered(tensors, r"blocks\.(\d+)\.attn\.qkv\.weight"))
    positions = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    side = int(positions**0.5)
    token = bool(positions) and side * side != positions
    lines += [
        "from timm.models.vision_transformer import VisionTransformer",
        f"model = VisionTransformer(img_size={side * patch or 224}, patch_size={patch}, "
        f"embed_dim={width}, depth={depth}, num_heads={max(1, width // 64)}, num_classes=0, "
        f"class_token={token}, global_pool='avg')",
        "# the number of heads is taken as one per 64 channels; all blocks attend globally, also "
        "those that have windows in the detector",
        f"# not filled: {'cls_token, ' if token else ''}norm or fc_norm",
    ]
    if token:
        lines.append(
            "# the detector has no class token: for its features drop pos_embed[:, 0] and set "
            "class_token=False"
        )
    return lines
