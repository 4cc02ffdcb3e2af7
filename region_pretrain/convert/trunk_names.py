"""Rules that translate the names of trunks to the common form of ``names.py``."""

from __future__ import annotations

import re
from collections.abc import Callable

#: (pattern that matches a complete name, its common form: a template or a function of the match)
Rule = tuple[str, "str | Callable[[re.Match], str]"]
ANY = r"(weight|bias|running_mean|running_var|num_batches_tracked)"


def translate(rules: tuple[Rule, ...], name: str) -> str | None:
    """The common form of a name, or None if no rule matches."""
    for pattern, form in rules:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(form) if isinstance(form, str) else form(match)
    return None


def _stage(match: re.Match, rest: str) -> str:
    return f"res{int(match[1]) + 1}.{match[2]}.{match.expand(rest)}"


RESNET: tuple[Rule, ...] = (
    (r"conv1\.weight", "stem.conv1.weight"),
    (rf"bn1\.{ANY}", r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.weight", lambda m: _stage(m, r"conv\3.weight")),
    (rf"layer(\d)\.(\d+)\.bn(\d)\.{ANY}", lambda m: _stage(m, r"conv\3.norm.\4")),
    (r"layer(\d)\.(\d+)\.downsample\.0\.weight", lambda m: _stage(m, "shortcut.weight")),
    (rf"layer(\d)\.(\d+)\.downsample\.1\.{ANY}", lambda m: _stage(m, r"shortcut.norm.\3")),
)

_BLOCK = r"(norm\d\.(?:weight|bias)|attn\.(?:qkv|proj)\.(?:weight|bias)|mlp\.fc\d\.(?:weight|bias))"
_BIAS_TABLE = r"attn\.(relative_position_bias_table)"

#: Swin as its authors, mmdetection and timm before 0.9 name it, which is Detectron2's naming.
SWIN: tuple[Rule, ...] = (
    (r"(patch_embed\.(?:proj|norm)\.(?:weight|bias))", r"\1"),
    (r"(absolute_pos_embed)", r"\1"),
    (rf"(layers\.\d\.blocks\.\d+)\.{_BLOCK}", r"\1.\2"),
    (rf"(layers\.\d\.blocks\.\d+)\.{_BIAS_TABLE}", r"\1.attn.\2"),
    (r"(layers\.\d\.downsample\.(?:norm|reduction)\.(?:weight|bias))", r"\1"),
    (r"(norm\d\.(?:weight|bias))", r"\1"),
)
#: timm since 0.9 has the downsampling at the start of the next stage.
SWIN_TIMM: tuple[Rule, ...] = (
    (
        r"layers\.(\d)\.downsample\.((?:norm|reduction)\.(?:weight|bias))",
        lambda m: f"layers.{int(m[1]) - 1}.downsample.{m[2]}",
    ),
    *SWIN,
)


def _swin_layer(match: re.Match) -> str:
    return f"layers.{(int(match[1]) - 1) // 2}"


SWIN_TORCHVISION: tuple[Rule, ...] = (
    (r"features\.0\.0\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"features\.0\.2\.(weight|bias)", r"patch_embed.norm.\1"),
    (
        r"features\.([1357])\.(\d+)\.(?:(norm\d|attn\.qkv|attn\.proj)\.(weight|bias))",
        lambda m: f"{_swin_layer(m)}.blocks.{m[2]}.{m[3]}.{m[4]}",
    ),
    (
        rf"features\.([1357])\.(\d+)\.{_BIAS_TABLE}",
        lambda m: f"{_swin_layer(m)}.blocks.{m[2]}.attn.{m[3]}",
    ),
    (
        r"features\.([1357])\.(\d+)\.mlp\.([03])\.(weight|bias)",
        lambda m: f"{_swin_layer(m)}.blocks.{m[2]}.mlp.fc{1 if m[3] == '0' else 2}.{m[4]}",
    ),
    (
        r"features\.([246])\.((?:norm|reduction)\.(?:weight|bias))",
        lambda m: f"layers.{int(m[1]) // 2 - 1}.downsample.{m[2]}",
    ),
)

#: ViT as timm, DINO, MAE and Detectron2 name it.
VIT: tuple[Rule, ...] = (
    (r"(pos_embed)", r"\1"),
    (r"(patch_embed\.proj\.(?:weight|bias))", r"\1"),
    (rf"(blocks\.\d+)\.{_BLOCK}", r"\1.\2"),
    (r"(blocks\.\d+\.attn\.rel_pos_[hw])", r"\1"),
)
_TV_BLOCK = r"encoder\.layers\.encoder_layer_(\d+)"
VIT_TORCHVISION: tuple[Rule, ...] = (
    (r"encoder\.pos_embedding", "pos_embed"),
    (r"class_token", "cls_token"),
    (r"conv_proj\.(weight|bias)", r"patch_embed.proj.\1"),
    (rf"{_TV_BLOCK}\.ln_(\d)\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (rf"{_TV_BLOCK}\.self_attention\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (rf"{_TV_BLOCK}\.self_attention\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (rf"{_TV_BLOCK}\.mlp\.(?:0|linear_1)\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (rf"{_TV_BLOCK}\.mlp\.(?:3|linear_2)\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
)

#: ConvNeXt as timm names it, and torchvision's names for it.
CONVNEXT: tuple[Rule, ...] = ((r"((?:stem|stages)\.\d\..*|norm_pre\..*)", r"\1"),)
#: Trunks of timm, as its files and a ``TimmBackbone`` name them.
TIMM: tuple[Rule, ...] = (*RESNET, *SWIN_TIMM, *VIT, *CONVNEXT)

_CONVNEXT_PARTS = {"0": "conv_dw", "2": "norm", "3": "mlp.fc1", "5": "mlp.fc2"}
CONVNEXT_TORCHVISION: tuple[Rule, ...] = (
    (r"features\.0\.([01])\.(weight|bias)", r"stem.\1.\2"),
    (
        r"features\.([1357])\.(\d+)\.layer_scale",
        lambda m: f"stages.{(int(m[1]) - 1) // 2}.blocks.{m[2]}.gamma",
    ),
    (
        r"features\.([1357])\.(\d+)\.block\.([0235])\.(weight|bias)",
        lambda m: (f"stages.{(int(m[1]) - 1) // 2}.blocks.{m[2]}.{_CONVNEXT_PARTS[m[3]]}.{m[4]}"),
    ),
    (
        r"features\.([246])\.([01])\.(weight|bias)",
        lambda m: f"stages.{int(m[1]) // 2}.downsample.{m[2]}.{m[3]}",
    ),
)
_FACEBOOK_PARTS = {"pwconv1": "mlp.fc1", "pwconv2": "mlp.fc2", "dwconv": "conv_dw", "norm": "norm"}
#: ConvNeXt as its authors name it. The layers ``grn`` are those of version 2.
CONVNEXT_FACEBOOK: tuple[Rule, ...] = (
    (r"downsample_layers\.0\.([01])\.(weight|bias)", r"stem.\1.\2"),
    (r"downsample_layers\.([123])\.([01])\.(weight|bias)", r"stages.\1.downsample.\2.\3"),
    (r"stages\.(\d)\.(\d+)\.gamma", r"stages.\1.blocks.\2.gamma"),
    (r"stages\.(\d)\.(\d+)\.grn\.gamma", r"stages.\1.blocks.\2.mlp.grn.weight"),
    (r"stages\.(\d)\.(\d+)\.grn\.beta", r"stages.\1.blocks.\2.mlp.grn.bias"),
    (
        r"stages\.(\d)\.(\d+)\.(dwconv|norm|pwconv1|pwconv2)\.(weight|bias)",
        lambda m: f"stages.{m[1]}.blocks.{m[2]}.{_FACEBOOK_PARTS[m[3]]}.{m[4]}",
    ),
)
