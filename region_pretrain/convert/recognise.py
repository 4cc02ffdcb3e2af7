"""Recognises whose weights a file contains, and translates their names to Detectron2's."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from glob import escape, glob
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch
from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from region_pretrain.convert.facts import FAIR_GN, FAIR_RESNEXT, IMAGENET, MSRA, Facts
from region_pretrain.convert.heads import background_last, missing_biases, swap_anchor_axes
from region_pretrain.convert.names import (
    SCHEMES,
    Scheme,
    common_name,
    timm_name,
    with_levels,
)
from region_pretrain.convert.reading import checkpoint_of, read_checkpoint
from region_pretrain.convert.trunk_names import translate
from region_pretrain.errors import UserError, describe
from region_pretrain.files import is_local

#: Entries of a checkpoint that contain its weights, the preferred ones first.
_CONTAINERS = (
    "model",
    "state_dict",
    "model_state",
    "model_state_dict",
    "network",
    "net",
    "backbone",
    "teacher",
    "student",
    "online_network",
)
#: In the names of OpenMMLab's files: the trunk was converted from Caffe2.
_CAFFE = re.compile(r"_(caffe|msra)")
#: Parts of names that mark a copy of the network which is not the one to fine-tune.
_COPIES = re.compile(r"(^|[._])(k|key|target|momentum|ema|teacher)([._]|$)")
#: Parameters of a ConvNeXt that only timm stores without dimensions of 1.
_PER_CHANNEL = (".gamma", ".grn.weight", ".grn.bias")
#: Names of Detectron2's detectors and trunks, after a prefix such as "module.".
_DETECTRON2 = re.compile(
    r"(?:backbone\w*\.)?(?:bottom_up\.|net\.)?"
    r"(?:stem\.conv1\.weight|res[2-5]\.0\.conv\d\.weight|timm\..*)"
)
_DETECTOR = ("backbone.", "roi_heads.", "proposal_generator.")
_DETECTRON2_ROOT = re.compile(r"(.*?)backbone(\w*)\.(?:bottom_up|net|timm|fpn_\w+|stem|res\d)\.")
#: The box head of a stage of a Cascade R-CNN.
BOX_HEAD_STAGE = re.compile(r"^roi_heads\.box_head\.(\d+)\.")
#: What trainers put before all names.
_WRAPPERS = re.compile(r"(?:(?:module|model|backbone|encoder|network)\.)*")


@dataclass
class Weights:
    """The weights of a file under common names; see :mod:`region_pretrain.convert.names`.

    Attributes:
        path: the file.
        title: what was recognised.
        tensors: common name -> tensor.
        names: common name -> name in the file.
        unused: name in the file -> tensor that has no counterpart in a detector of Detectron2.
        prefix: what precedes the names of the network in the file.
        facts: what the weights presume.
        classes: names of the detector's classes, if the file has them.
        by_suffix: whether names lack the modules above them, as in the model zoo's older files.
        folded_norms: whether batch norms are affine layers, with statistics folded into them.
    """

    path: str
    title: str
    tensors: dict[str, Tensor]
    names: dict[str, str]
    unused: dict[str, Tensor] = field(default_factory=dict)
    prefix: str = ""
    facts: Facts = Facts()
    classes: list[str] = field(default_factory=list)
    by_suffix: bool = False
    folded_norms: bool = False

    def fit(self, target: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Find a tensor for each name of a model.

        Args:
            target: the model's state dict.

        Returns:
            (the model's name -> tensor of the file, whose shape may differ; names in the file of
            tensors that the model lacks).
        """
        known = {**self.tensors, **self.unused}
        found, used = {}, set()
        for name in target:
            key = next((key for key in self._keys(name) if key in known), None)
            if key is not None:
                found[name] = known[key]
                used.add(key)
        stages = {key: match[1] for key in known if (match := BOX_HEAD_STAGE.match(key))}
        if stages.keys() & used and not any(map(BOX_HEAD_STAGE.match, target)):
            used.update(key for key, stage in stages.items() if stage != "0")  # one head for all
        return found, [self.names.get(key, key) for key in known if key not in used]

    def stages_differ(self) -> bool:
        """Whether the weights have several box heads, of a Cascade R-CNN, that are not equal."""
        stages: dict[str, list[Tensor]] = {}
        for name, tensor in self.tensors.items():
            if match := BOX_HEAD_STAGE.match(name):
                stages.setdefault(name[match.end() :], []).append(tensor)
        return any(not torch.equal(heads[0], head) for heads in stages.values() for head in heads)

    def _keys(self, name: str) -> Iterator[str]:
        """Where a model's tensor may be found, in common names and then in the file's own."""
        common, own = common_name(name), timm_name(name)
        yield common
        # One box head fills all stages of a Cascade R-CNN, and its first stage's fills one head.
        yield BOX_HEAD_STAGE.sub("roi_heads.box_head.", common)
        yield re.sub(r"^roi_heads\.box_head\.(?!\d)", "roi_heads.box_head.0.", common)
        if own is not None:  # a tensor that only timm's network has
            yield own
            yield self.prefix + own
        if self.by_suffix:
            parts = common.split(".")
            yield from (".".join(parts[i:]) for i in range(1, len(parts) - 1))


def read_weights(path: str) -> Weights:
    """Read a checkpoint of any known origin.

    Args:
        path: file, URL, or a run's output folder. ``?as=LIBRARY`` overrides what is recognised
            (``detectron2``, ``torchvision``, ``timm``, ``mmdet``, ``facebook``, ``release``,
            ``swin``), ``?part=NAME`` selects an entry of the file or a prefix of the names, e.g.
            ``student``.

    Raises:
        UserError: see :func:`~region_pretrain.convert.reading.read_checkpoint`; an unknown option;
            or the file has no weights.
    """
    file, options = _split(path)
    content = read_checkpoint(file)
    file = checkpoint_of(file)
    try:
        return _weights(file, content, options)
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise UserError(
            f"{file} is not a checkpoint: its content has an unknown form ({describe(error)[:200]})"
        ) from error


def check_weights(path: str, where: str = "") -> None:
    """Refuse a local path, as of :func:`read_weights`, at which there is no file.

    Args:
        path: not checked if it is empty or a URL.
        where: begins the message, e.g. the key that names the path.

    Raises:
        UserError: there is none; the message names the newest weights of an unfinished run.
    """
    if not path or not is_local(path) or os.path.exists(path) and not os.path.isdir(path):
        return
    file = checkpoint_of(os.path.expanduser(_split(path)[0]))
    if os.path.exists(file):
        return
    folder, name = os.path.split(file)
    found = sorted(glob(os.path.join(escape(folder), "model_[0-9]*.pth")))
    if name == "model_final.pth" and found:
        raise UserError(
            f"{where}the run in {folder} is not finished: continue it with --resume "
            f"(resume=True), or name its newest weights, {found[-1]}"
        )
    raise UserError(f"{where}there is no {file}: name the folder of a finished run, or weights")


def _weights(file: str, content: Any, options: dict[str, str]) -> Weights:
    if not isinstance(content, Mapping):
        raise UserError(
            f"{file} is not a checkpoint: it contains a {type(content).__name__}, not a dict"
        )
    if _is_caffe2(content):
        return _caffe2(file, content)
    where, state = _weights_of(file, content, options.get("part"))
    if options.get("part") in where.split("."):
        options = {key: value for key, value in options.items() if key != "part"}
    weights = _recognise(file, state, options)
    if where:
        weights.title += f", in {where!r}"
    facts = content.get("detector")
    if isinstance(content.get("metadata"), Mapping):  # of our safetensors
        facts = json.loads(content["metadata"].get("detector", "null"))
    if isinstance(facts, Mapping):
        weights.facts = Facts.from_dict(facts)
    weights.classes = [str(name) for name in content.get("thing_classes", ())]
    if content.get("__author__") == "Detectron2 Model Zoo":
        weights.facts = _zoo(weights.tensors)
    if content.get("__author__") == "torchvision":  # of Detectron2's script
        weights.facts = IMAGENET
    weights.by_suffix = bool(content.get("matching_heuristics")) or "matching_heuristics" in options
    return weights


def _split(path: str) -> tuple[str, dict[str, str]]:
    query = urlsplit(path).query
    options = {key: values[-1] for key, values in parse_qs(query).items()}
    if not options:
        return path, {}
    unknown = options.keys() - {"as", "part", "matching_heuristics"}
    if unknown:
        raise UserError(f"{path}: unknown option {sorted(unknown)[0]!r}; known: as, part")
    libraries = sorted({"detectron2", *(scheme.library for scheme in SCHEMES)})
    if "as" in options and options["as"] not in libraries:
        raise UserError(f"{path}: as={options['as']} must be one of {', '.join(libraries)}")
    return path[: path.rindex("?")], options


def _is_caffe2(content: Mapping[str, Any]) -> bool:
    return "blobs" in content or "res2_0_branch2a_w" in content


def _caffe2(path: str, content: Mapping[str, Any]) -> Weights:
    """The model zoo's files from Detectron 1: batch norms are affine, without statistics."""
    blobs = content.get("blobs", content)
    state = {
        k: v for k, v in blobs.items() if isinstance(v, Tensor) and not k.endswith("_momentum")
    }
    tensors, names = convert_c2_detectron_names(state)
    folded = [n for n in tensors if n.endswith("norm.weight") and names[n].endswith("_bn_s")]
    for name in folded:
        stem = name.removesuffix("weight")
        for statistic, value in (("running_mean", 0.0), ("running_var", 1.0 - 1e-5)):
            tensors[stem + statistic] = torch.full_like(tensors[name], value)
            names[stem + statistic] = names[name]
    weights = Weights(path, "a Caffe2 model", tensors, names, facts=_zoo(tensors), by_suffix=True)
    weights.folded_norms = bool(folded)
    if "res2.0.conv2.norm.weight" in tensors and "res2.0.conv2.norm.weight" not in folded:
        weights.facts = FAIR_GN
    return weights


def _zoo(tensors: Mapping[str, Tensor]) -> Facts:
    """The facts of the model zoo's networks that were trained from Caffe2 files."""
    block = tensors.get("res2.0.conv2.weight")
    if block is None or "fpn_lateral2.norm.weight" in tensors:
        return Facts()
    if block.shape[0] == block.shape[1]:
        return MSRA
    deep = "res4.35.conv1.weight" in tensors
    return replace(FAIR_RESNEXT, pixel_std=(1.0, 1.0, 1.0)) if deep else FAIR_RESNEXT


def _weights_of(
    path: str, content: Mapping[str, Any], part: str | None
) -> tuple[str, dict[str, Tensor]]:
    """The entry of a checkpoint that contains the weights, and its name."""
    found = dict(_state_dicts(content))
    if not found:
        entries = ", ".join(sorted(map(str, content))[:6]) or "nothing"
        raise UserError(f"{path} is not a checkpoint: no named tensors, but {entries}")
    if part is not None:
        chosen = [name for name in found if part in name.split(".")]
        if chosen:
            return chosen[0], found[chosen[0]]
    ranks = {name: i for i, name in enumerate(_CONTAINERS)}

    def rank(name: str) -> tuple[int, int]:
        return ranks.get(name.split(".")[-1], len(ranks) if name else -1), -len(found[name])

    best = min(found, key=rank)
    if best == "" and max(map(len, found.values())) > len(found[best]):
        best = min((name for name in found if name), key=rank)
    return best, found[best]


def _state_dicts(content: Mapping, name: str = "") -> Iterator[tuple[str, dict[str, Tensor]]]:
    tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, Tensor)}
    if tensors:
        yield name, tensors
    for key, value in content.items():
        if isinstance(key, str) and isinstance(value, Mapping) and name.count(".") < 2:
            yield from _state_dicts(value, f"{name}.{key}" if name else key)


def _recognise(path: str, state: dict[str, Tensor], options: Mapping[str, str]) -> Weights:
    library, part = options.get("as"), options.get("part")
    if library in (None, "detectron2") and (library or any(map(_is_detectron2, state))):
        return _detectron2(path, state, part)
    for scheme in SCHEMES:
        if library not in (None, scheme.library):
            continue
        prefixes = _prefixes(state, scheme)
        if prefixes:
            return _translated(path, state, scheme, _preferred(path, prefixes, part))
    if library not in (None, "timm"):  # timm's other networks have the names of their backbone
        raise UserError(f"{path} has no names of {library}, but e.g. {', '.join([*state][:3])}")
    return _detectron2(path, state, part)


def _is_detectron2(name: str) -> bool:
    return bool(_DETECTRON2_ROOT.match(name)) or bool(_DETECTRON2.fullmatch(name))


def _prefixes(state: Mapping[str, Tensor], scheme: Scheme) -> list[str]:
    """What may precede the names of a scheme; empty if it does not fit."""
    prefixes = [m[1] for m in (re.fullmatch(rf"(.*?){scheme.anchor}", k) for k in state) if m]
    return [
        prefix
        for prefix in prefixes
        if all(
            any(k.startswith(prefix) and re.fullmatch(o, k[len(prefix) :]) for k in state)
            for o in scheme.others
        )
    ]


def _preferred(path: str, prefixes: list[str], part: str | None) -> str:
    """The online or query network rather than its momentum copy; then the shortest prefix."""
    if part is not None and not any(part in prefix for prefix in prefixes):
        raise UserError(f"{path} has no part {part}: neither an entry nor a prefix of the names")

    def rank(prefix: str) -> tuple[bool, bool, int]:
        return part is not None and part not in prefix, bool(_COPIES.search(prefix)), len(prefix)

    return min(prefixes, key=rank)


def _translated(path: str, state: dict[str, Tensor], scheme: Scheme, prefix: str) -> Weights:
    tensors, names, unused = {}, {}, {}
    for name, tensor in state.items():
        common = None
        if name.startswith(prefix):
            common = translate(scheme.rules, name[len(prefix) :])
        if common is None:
            unused[name] = tensor
        else:
            per_channel = common.endswith(_PER_CHANNEL)  # (C, 1, 1) in torchvision
            tensors[common] = tensor.flatten() if per_channel else tensor
            names[common] = name
    numbered = with_levels(tensors)
    names = dict(zip(numbered, names.values(), strict=True))
    if scheme.library == "torchvision":
        numbered = background_last(numbered)
        biases = missing_biases(numbered)
        numbered |= biases
        names |= {bias: names[bias.removesuffix("bias") + "weight"] for bias in biases}
    if scheme.library in ("torchvision", "mmdet"):
        numbered = swap_anchor_axes(numbered)
    title = scheme.title + (f" under {prefix!r}" if prefix else "")
    facts = IMAGENET if scheme.imagenet else Facts()
    if (scheme.imagenet or scheme.library == "mmdet") and _CAFFE.search(os.path.basename(path)):
        facts = MSRA
    return Weights(path, title, numbered, names, unused, prefix, facts)


def _detectron2(path: str, state: dict[str, Tensor], part: str | None) -> Weights:
    """Names of Detectron2, possibly with ``module.`` or another backbone's name before them.

    Files whose names are not known at all are read in the same way.
    """
    roots = {(m[1], m[2]) for m in map(_DETECTRON2_ROOT.match, state) if m}
    texts = {f"{before}backbone{after}.": before for before, after in roots}
    root = _preferred(path, sorted(texts), part) if texts or part is not None else ""
    prefix = texts[root] if texts else _WRAPPERS.match(os.path.commonprefix([*state]))[0]
    others = tuple(text for text in texts if text != root)
    tensors, names, unused = {}, {}, {}
    for name, tensor in state.items():
        if others and name.startswith(others):
            unused[name] = tensor
            continue
        plain = name.removeprefix(prefix)
        if root and name.startswith(root):
            plain = "backbone." + name.removeprefix(root)
        common = common_name(plain)
        tensors[common], names[common] = tensor, name
    heads = any(name.startswith(_DETECTOR) for name in state)
    known = heads or any(map(_is_detectron2, state))
    title = "a Detectron2 model" if known else "an unrecognised network"
    title += f" under {root!r}" if root not in ("", "backbone.") else ""
    return Weights(path, title, tensors, names, unused)
