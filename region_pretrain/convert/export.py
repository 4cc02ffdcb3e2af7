"""Exports a detector's weights to other libraries, under their names."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor

from region_pretrain.convert import names, targets
from region_pretrain.convert.digest import DIGEST, digest_of
from region_pretrain.convert.heads import background_first, swap_anchor_axes
from region_pretrain.convert.layout import is_bottleneck, is_fcos, numbered, rows, trunk_kind
from region_pretrain.convert.names import common_name, timm_name
from region_pretrain.convert.reading import checkpoint_of
from region_pretrain.convert.recognise import Weights, read_weights
from region_pretrain.convert.timm_target import check_plain_resnet, own_lines
from region_pretrain.convert.trunk_names import RESNET, SWIN_TIMM, VIT, Rule, translate
from region_pretrain.errors import UserError, first_few
from region_pretrain.files import is_local, make_writable, write_atomic

#: What ``to`` may be.
TARGETS = ("torchvision", "timm", "mmdet", "detectron2", "safetensors")
_TRUNK = r"(stem|res\d|layers|blocks|patch_embed|norm\d|(absolute_)?pos_embed)\b"
_HEADS = r"(roi_heads|proposal_generator|head)\..*"
_MAX_BLOCK = 47  # ResNet-200 has 36 blocks in a stage, the largest ViT 48 in all
_EXAMPLES = 3


def export_weights(checkpoint: str, to: str) -> tuple[dict[str, Tensor], list[str]]:
    """The detector's weights under another library's names.

    Args:
        checkpoint: file or URL that :func:`~region_pretrain.convert.recognise.read_weights` reads,
            or the output folder of a run, whose ``model_final.pth`` is read.
        to: one of :data:`TARGETS`.

    Returns:
        (state dict, lines). Lines are the target's configuration; those that begin with ``#`` say
        what it cannot express, what is left out and what stays at its initialisation.

    Raises:
        UserError: unknown target; the checkpoint cannot be read; or the target cannot compute the
            same features.
    """
    exported = _export(checkpoint, to)
    return exported.state, exported.lines


def write_export(checkpoint: str, to: str, out: str | None = None) -> tuple[str, list[str]]:
    """Export to a file.

    Args:
        checkpoint, to: as for :func:`export_weights`.
        out: file to write; None writes ``<checkpoint>_<to>.pth`` beside the checkpoint, or
            ``.safetensors``. Detectron2's may also end in ``.pkl``.

    Returns:
        (the file, the lines).

    Raises:
        UserError: see :func:`export_weights`; or the suffix does not fit the target, or the folder
            cannot be written.
    """
    given = out is not None
    if out is None:
        out = _default_out(_file_of(checkpoint), to)
    suffix = os.path.splitext(out)[1]
    allowed = {"detectron2": (".pth", ".pkl"), "safetensors": (".safetensors",)}.get(to, (".pth",))
    if suffix not in allowed:
        raise UserError(f"--out {out}: a file for {to} must end in {' or '.join(allowed)}")
    if given or os.path.isdir(os.path.dirname(out) or "."):  # or the checkpoint is missing
        make_writable(os.path.dirname(out), "the folder of --out" if given else "the folder")
    exported = _export(checkpoint, to)
    facts = exported.weights.facts.to_dict()
    # A tensor may be a view of a larger storage, which would be written with it.
    state = {name: tensor.contiguous().clone() for name, tensor in exported.state.items()}
    content: Any = state
    if to == "mmdet":
        content = {"meta": {"detector": facts}, "state_dict": state}
    elif to == "detectron2":
        content = {"model": state, "__author__": "region_pretrain", "detector": facts}
        if exported.by_suffix:
            content["matching_heuristics"] = True
    if to == "safetensors":
        metadata = {"format": "pt", "detector": json.dumps(facts)}
        metadata[DIGEST] = digest_of({"model": state, "metadata": metadata})
        data = save(state, metadata)
        write_atomic(out, lambda f: f.write(data))
    elif suffix == ".pkl":
        # NumPy has no bfloat16; float32 has all its values.
        content["model"] = {
            k: v.float() if v.dtype == torch.bfloat16 else v for k, v in state.items()
        }
        content[DIGEST] = digest_of(content)
        content["model"] = {k: v.numpy() for k, v in content["model"].items()}
        write_atomic(out, lambda f: pickle.dump(content, f))
    else:
        write_atomic(out, lambda f: torch.save(content, f))
    return out, exported.lines


class _Exported(NamedTuple):
    weights: Weights
    state: dict[str, Tensor]
    lines: list[str]
    by_suffix: bool = False


def _file_of(checkpoint: str) -> str:
    path = checkpoint_of(checkpoint)
    if path != checkpoint and not os.path.isfile(path):
        raise UserError(
            f"{checkpoint} has no model_final.pth: name one of its checkpoints, or finish the run"
        )
    return path


def _default_out(path: str, to: str) -> str:
    if not is_local(path) or "?" in path:
        raise UserError(f"{path} is not a local file: choose the output with --out FILE")
    suffix = "safetensors" if to == "safetensors" else "pth"
    return f"{os.path.splitext(path)[0]}_{to}.{suffix}"


def _export(checkpoint: str, to: str) -> _Exported:
    if to not in TARGETS:
        raise UserError(f"--to {to}: must be one of {', '.join(TARGETS)}")
    path = _file_of(checkpoint)
    weights = read_weights(path)
    if to in ("detectron2", "safetensors"):
        return _to_detectron2(weights)
    return _to_library(path, weights, to)


def _to_detectron2(weights: Weights) -> _Exported:
    """Stock names: those of the file, or else those of a detector with an FPN or a bare trunk."""
    stock = any(n.startswith("backbone.") and common_name(n) == c for c, n in weights.names.items())
    pyramid = any(common.startswith("fpn_lateral") for common in weights.tensors)
    state = {}
    for common, tensor in weights.tensors.items():
        name = weights.names[common] if stock else common
        if pyramid and not stock:
            name = re.sub(rf"^(?={_TRUNK})", "bottom_up.", name)
            name = re.sub(r"^(?=bottom_up\.|fpn_|top_block\.)", "backbone.", name)
        state[name] = tensor
    bare = any(re.match(_TRUNK, name) for name in state)
    lines = targets.detectron2_lines(weights.tensors, weights.facts, sorted(state))
    if bare:
        lines.append("# a bare trunk: DetectionCheckpointer matches its names by their ends")
    return _Exported(weights, state, lines + _left_out(weights.unused, "a detector"), bare)


def _to_library(path: str, weights: Weights, to: str) -> _Exported:
    tensors = weights.tensors
    own = {timm_name(weights.names[common]): common for common in tensors}
    own.pop(None, None)
    if to == "timm" and own:
        return _to_timm(weights, own)
    if weights.facts.timm is not None:
        check_plain_resnet(path, weights.facts.timm, to)
    kind = trunk_kind(tensors)
    if kind is None or (kind != "ResNet" and to != "timm"):
        known = "ResNet, Swin or ViT" if to == "timm" else "ResNet"
        raise UserError(
            f"{path} has no {known} to export to {to}: it was read as {weights.title}"
            + (f", with a {kind or 'network of timm'}; use --to timm" if kind or own else "")
        )
    if any("conv2_offset" in name for name in (*tensors, *weights.unused)):
        raise UserError(
            f"{path} has deformable convolutions, which the ResNet for {to} lacks: its features "
            "would be wrong. Use --to detectron2"
        )
    if to != "mmdet" and weights.facts.stride_in_1x1 and is_bottleneck(tensors):
        raise UserError(
            f"{path} has the stride in the bottlenecks' 1x1 convolutions, which {to}'s ResNet has "
            "in the 3x3 ones: its features would be wrong. Use --to mmdet or --to detectron2"
        )
    if to != "mmdet" and (dilation := weights.facts.res5_dilation or 1) > 1:
        raise UserError(
            f"{path} has dilation {dilation} in res5 (DC5), in which the first block of {to}'s "
            "ResNet differs: its features would be wrong. Use --to mmdet or --to detectron2"
        )
    if to == "mmdet" and "stem.conv1.norm.running_mean" not in tensors:
        raise UserError(f"{path} has no batch norm in its trunk: --to mmdet supports no other norm")
    left = {
        pattern: reason
        for pattern, reason in _inexpressible(tensors, to, kind)
        if any(re.fullmatch(pattern, k) for k in tensors)
    }
    kept = {
        k: v
        for k, v in tensors.items()
        if not any(re.fullmatch(pattern, k) for pattern in left)
        and not k.endswith("relative_position_index")  # computed by the target
    }
    detector = to != "timm" and any(k.startswith("fpn_lateral") for k in kept)
    rules = _rules(to, kind, detector)
    renamed = {_unnumbered(kept, common, to): common for common in kept}
    if to != "timm":
        kept = swap_anchor_axes(kept)
    if to == "torchvision":
        kept = background_first(kept)
    state, done = {}, set()
    for form, common in renamed.items():
        name = _name_for(form, rules, kept, common)
        if name is not None:
            state[name] = kept[common]
            done.add(common)
    others = [weights.names[common] for common in kept if common not in done]
    filled = {_head_of(weights.names[common]) for common in done}
    exported = {common: kept[common] for common in done}
    lines = targets.lines_for(to, exported, weights.facts, sorted(state), tensors)
    lines += [f"# left out: {reason}" for reason in dict.fromkeys(left.values())]
    others = [n if (head := _head_of(n)) in filled else head for n in (*others, *weights.unused)]
    lines += _left_out(others, to)
    return _Exported(weights, state, lines)


def _head_of(name: str) -> str:
    """``roi_heads.box_head`` of one of its tensors; other names do not change."""
    return re.sub(r"^(roi_heads\.\w+)\..*", r"\1", name)


def _to_timm(weights: Weights, own: Mapping[str, str]) -> _Exported:
    """The trunk of a ``TimmBackbone``, which has timm's names after a prefix."""
    state = {name: weights.tensors[common] for name, common in own.items()}
    trunk = set(own.values())
    others = [name for common, name in weights.names.items() if common not in trunk]
    left = _left_out([*others, *weights.unused], "timm")
    return _Exported(weights, state, own_lines(weights.facts, sorted(state)) + left)


def _left_out(found: Iterable[str], to: str) -> list[str]:
    found = [name for name in found if not name.endswith("relative_position_index")]  # derived
    found = list(dict.fromkeys(found))
    if not found:
        return []
    return [f"# left out, not exported to {to}: {first_few(found, _EXAMPLES)}"]


def _rules(to: str, kind: str, detector: bool) -> tuple[Rule, ...]:
    if to == "mmdet":
        return names.MMDETECTION
    if to == "torchvision" and detector:
        return names.TORCHVISION_DETECTOR
    return {"ResNet": RESNET, "Swin": SWIN_TIMM, "ViT": VIT}[kind]


def _inexpressible(tensors: Mapping[str, Tensor], to: str, kind: str) -> Iterator[tuple[str, str]]:
    """Patterns of the common names that the target has no counterpart for, each with the reason."""
    if to == "timm":
        yield r"(fpn_|top_block|simfp_|roi_heads|proposal_generator|head\.).*", (
            "FPN and heads: timm has trunks only"
        )
        if kind == "Swin":
            yield r"norm\d\..*", "the norms of the trunk's outputs: timm has none per stage"
        if kind == "ViT" and "blocks.0.attn.rel_pos_h" in tensors:
            yield r".*rel_pos_[hw]", (
                "relative positions: timm's ViT has none, so its features differ"
            )
        return
    if not any(k.startswith("fpn_lateral") for k in tensors):
        if any(re.fullmatch(_HEADS, k) for k in tensors):
            yield _HEADS, f"the heads: without an FPN, as in C4 detectors, {to} gets the trunk only"
        return
    if is_fcos(tensors):
        yield r"head\..*", f"FCOS's head: it is not exported to {to}"
        return
    if any(re.fullmatch(r"head\.\w+_subnet\.\d*[13579]\..*", k) for k in tensors):
        yield r"head\..*", "RetinaNet's head: one with norms is not supported"
    anchors = rows(tensors, "head.bbox_pred.weight") // 4
    if anchors not in (0, 1, 2, 3, 5, 7, 9):
        yield r"head\.(cls_score|bbox_pred)\..*", (
            f"RetinaNet's predictors: the order of {anchors} anchors depends on their sizes and "
            "ratios, which are not in the file"
        )
    if to == "mmdet":
        if "proposal_generator.rpn_head.conv.conv0.weight" in tensors:
            yield r"proposal_generator\..*", "the RPN: only one convolution is supported"
        return
    fcs = len(numbered(tensors, r"roi_heads\.box_head\.fc(\d+)\.weight"))
    convs = len(numbered(tensors, r"roi_heads\.box_head\.conv(\d+)\.weight"))
    if fcs and (fcs != 1 if convs else fcs not in (1, 2)):
        yield r"roi_heads\.box_(head|predictor)\..*", (
            f"the box head: {convs} convolutions and {fcs} linear layers are not supported"
        )
    classes = rows(tensors, "roi_heads.box_predictor.cls_score.weight") - 1
    boxes = rows(tensors, "roi_heads.box_predictor.bbox_pred.weight")
    if boxes and boxes != 4 * classes:
        yield r"roi_heads\.box_predictor\..*", (
            "the box predictor: torchvision has boxes per class, these are class-agnostic"
        )
    masks = rows(tensors, "roi_heads.mask_head.predictor.weight")
    if masks and classes > 0 and masks != classes:
        yield r"roi_heads\.mask_head\.(predictor|deconv)\..*", (
            "the mask predictor: torchvision has masks per class, these are class-agnostic"
        )


def _unnumbered(tensors: Mapping[str, Tensor], common: str, to: str) -> str:
    """The inverse of :func:`~region_pretrain.convert.names.with_levels` for one name."""
    levels = numbered(tensors, r"fpn_lateral(\d+)\.weight")
    match = re.match(r"(fpn_lateral|fpn_output|top_block\.p)(\d)\.(.*)", common)
    if match and levels and (match[1].startswith("fpn_") or to == "mmdet"):
        stem = match[1] if match[1].startswith("fpn_") else "fpn_output"
        return f"{stem}<{int(match[2]) - levels[0]}>.{match[3]}"
    return common.replace("rpn_head.conv.conv0.", "rpn_head.conv.")


def _name_for(
    form: str, rules: tuple[Rule, ...], tensors: Mapping[str, Tensor], common: str
) -> str | None:
    """The target's name of a common name; None if it has none."""
    found = [name for name in _inverse(rules).get(form, ()) if translate(rules, name) == form]
    if form.startswith("roi_heads.box_head.fc1."):
        # Linear layers follow the convolutions and a Flatten in torchvision's nn.Sequential.
        convs = len(numbered(tensors, r"roi_heads\.box_head\.conv(\d+)\.weight"))
        alone = "roi_heads.box_head.fc2.weight" not in tensors
        place = f"roi_heads.box_head.{convs + 1}.{form.rsplit('.', 1)[1]}"
        if (convs or alone) and place in found:
            return place
    stem = common.rsplit(".", 1)[0]
    if ".norm." in form and f"{stem}.running_mean" not in tensors:
        found.sort(key=lambda name: ".gn." not in name)  # mmdetection's GroupNorm
    return found[0] if found else None


@cache
def _inverse(rules: tuple[Rule, ...]) -> dict[str, list[str]]:
    """Common name -> names that the rules translate to it, of which the first is preferred."""
    table: dict[str, list[str]] = {}
    for pattern, form in rules:
        compiled = re.compile(pattern)
        for name in matches_of(pattern):
            match = compiled.fullmatch(name)
            common = match.expand(form) if isinstance(form, str) else form(match)
            table.setdefault(common, []).append(name)
    return table


def matches_of(pattern: str) -> list[str]:
    r"""All names that a rule's pattern matches, with ``\d+`` up to the largest number of a block.

    Earlier alternatives come first, names with an optional part before those without. Supports the
    syntax of the rules: groups, ``|``, ``?``, ``\d``, ``\d+``, ``[...]`` and escaped characters.
    """
    tokens = re.findall(r"\(\?:|\[[^]]+\]|\\d\+|\\.|.", pattern)
    place = 0

    def alternatives() -> list[str]:
        nonlocal place
        found = sequence()
        while place < len(tokens) and tokens[place] == "|":
            place += 1
            found += sequence()
        return found

    def sequence() -> list[str]:
        nonlocal place
        found = [""]
        while place < len(tokens) and tokens[place] not in ("|", ")"):
            item = atom()
            if place < len(tokens) and tokens[place] == "?":
                place += 1
                item = [*item, ""]
            found = [head + tail for head in found for tail in item]
        return found

    def atom() -> Iterable[str]:
        nonlocal place
        token = tokens[place]
        place += 1
        if token in ("(", "(?:"):
            found = alternatives()
            place += 1  # the closing parenthesis
            return found
        if token == r"\d+":
            return [str(i) for i in range(_MAX_BLOCK + 1)]
        if token == r"\d":
            return "0123456789"
        if token.startswith("["):
            return _characters(token[1:-1])
        return token[-1]

    return alternatives()


def _characters(text: str) -> Iterable[str]:
    bounds = re.fullmatch(r"(\d)-(\d)", text)
    return [str(i) for i in range(int(bounds[1]), int(bounds[2]) + 1)] if bounds else text
