"""Loads pre-trained weights into a detector and reports what was and was not loaded."""

from __future__ import annotations

import logging
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field

from tabulate import tabulate
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from region_pretrain.convert.facts import differences, facts_of
from region_pretrain.convert.names import common_name
from region_pretrain.convert.recognise import BOX_HEAD_STAGE, Weights, read_weights
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import detector_part

logger = logging.getLogger(__name__)

#: Layers whose shape depends on the number of classes: if it differs, they are not loaded.
CLASS_LAYERS = (".box_predictor.", ".mask_head.predictor.", ".cls_score.")
_EXAMPLES = 3
#: Buffers that are derived, or that only count: whoever lacks them loses nothing.
_DERIVED = re.compile(
    r"num_batches_tracked$|relative_position_index$|attn_mask$|anchor_generator\.cell_anchors\.\d+$"
)
#: What Detectron2's own files have beside a stem: MSRA's bias before a norm that was folded, and
#: the classifier, which its scripts that convert weights put there.
_BESIDE_STEM = re.compile(r"stem\.(conv1\.bias|fc\.(weight|bias))")
_RESNET = re.compile(r"stem\.(?!fc\.)|res\d\.")
#: Parameters that detectors add to a trunk, where they start at the identity.
_ADDED = re.compile(
    r"attn\.rel_pos_[hw]$|^backbone\.(bottom_up\.)?norm\d\.|\.conv2_offset\.(weight|bias)$"
    r"|^roi_heads\.res5\.norm\."  # of C4 detectors with such a norm
)


@dataclass
class ModuleCount:
    """How much of a module was loaded: tensors of its state dict, and numbers in them."""

    loaded_tensors: int = 0
    tensors: int = 0
    loaded_values: int = 0
    values: int = 0


@dataclass
class TransferReport:
    """What was loaded from a checkpoint. Names are those of the model's state dict.

    Derived buffers, such as ``num_batches_tracked``, are left out if only one side has them.

    Attributes:
        path: path of the checkpoint.
        source: what was recognised in it.
        matched: loaded tensors.
        missing: tensors of the model that the checkpoint lacks; they keep their values.
        unexpected: tensors of the checkpoint that the model lacks, under the checkpoint's names.
        mismatched: (name, shape in the checkpoint, shape in the model) of tensors that were not
            loaded because their shapes differ.
        modules: counts per module, in the model's order.
        classes: the names of the classes that the checkpoint was trained on; empty if unknown.
    """

    path: str
    source: str = ""
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    modules: dict[str, ModuleCount] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

    @property
    def incomplete(self) -> list[str]:
        """The modules of which the checkpoint lacks tensors."""
        return [name for name, n in self.modules.items() if n.loaded_tensors < n.tensors]

    def summary(self) -> str:
        """A table with one line per module, and a line for unused tensors of the checkpoint."""
        rows = []
        for name, count in self.modules.items():
            state = "loaded" if count.loaded_tensors == count.tensors else "partly loaded"
            rows.append(
                (
                    name,
                    f"{count.loaded_tensors}/{count.tensors}",
                    f"{count.loaded_values:,}/{count.values:,}",
                    state if count.loaded_tensors else "new",
                )
            )
        lines = [
            f"weights from {self.path} ({self.source})",
            tabulate(
                rows,
                headers=["module", "tensors", "values", ""],
                colalign=("left", "right", "right", "left"),
            ),
        ]
        if self.unexpected:
            unused = Counter(_first_parts(name) for name in self.unexpected)
            text = ", ".join(f"{name} ({n})" for name, n in unused.items())
            lines.append(f"not used by this model: {text}")
        return "\n".join(lines)


#: Stages of hierarchical networks: a detector may lack the last ones, unlike the blocks of a ViT.
_STAGE = r"(?:layers|stages)\.\d+"


def module_of(name: str) -> str:
    """The module of a detector that a tensor belongs to, e.g. ``"roi_heads.box_head"``.

    This is the top-level module. RoI heads, the towers of a one-stage detector, and a backbone with
    a feature pyramid are divided further into what pre-training can fill separately, e.g.
    ``backbone.bottom_up``, ``backbone.fpn``, ``head.cls_subnet``.
    """
    parts = name.split(".")
    if parts[0] == "roi_heads" or parts[:2] in (["head", "cls_subnet"], ["head", "bbox_subnet"]):
        return ".".join(parts[:2])
    if parts[0] == "backbone" and len(parts) > 1:
        if parts[1] in ("bottom_up", "net", "top_block"):
            return ".".join(parts[:2])
        if parts[1].startswith(("fpn_", "simfp_")):
            return "backbone.fpn"
    return parts[0]


def _first_parts(name: str) -> str:
    name = name.removeprefix("module.")
    return module_of(name) if name.startswith(("backbone.", "roi_heads.")) else name.split(".")[0]


def is_trunk(name: str) -> bool:
    """Whether a tensor belongs to a detector's trunk, including the res5 of a C4 head."""
    return module_of(name) in ("backbone", "backbone.bottom_up", "backbone.net", "roi_heads.res5")


def group_of(name: str) -> str:
    """The part of a detector that is loaded completely or not at all.

    These are the stages of the trunk, the convolutions and the fully connected layers of the box
    heads, and the other modules of :func:`module_of`, e.g. ``backbone.bottom_up.res3``,
    ``backbone.fpn``, ``roi_heads.box_head.fc``.
    """
    module = module_of(name)
    if module in ("backbone", "backbone.bottom_up", "backbone.net"):
        stage = re.match(r"(?:layers|blocks|stages)\.\d+|[^.]+", common_name(name))[0]
        return f"{module}.{stage}"
    layer = re.match(r"roi_heads\.box_head\.(?:\d+\.)?(conv|fc)\d", name)  # a cascade has several
    stage = re.match(_STAGE, name)  # in common names
    return f"{module}.{layer[1]}" if layer else stage[0] if stage else module


def load_pretrained(model: nn.Module, path: str, partial: bool = False) -> TransferReport:
    """Load weights of any known origin into a detector, and check that they fit.

    :func:`~region_pretrain.convert.recognise.read_weights` recognises the file and translates its
    names. A checkpoint of this library has the detector's tensors under ``"model"``.

    Args:
        model: the detector, not wrapped in DDP; filled in place. Of a pre-training model only the
            ``detector_modules`` are filled.
        path: checkpoint file or URL, with the options of
            :func:`~region_pretrain.convert.recognise.read_weights`.
        partial: accept a file that has only some tensors of a stage, an FPN or a head; the others
            keep their initialisation.

    Returns:
        What was loaded; its summary has been logged.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, or contains code; no tensor of
            it fits; shapes differ in other layers than those that depend on the number of classes;
            it fills only a part of a group (:func:`group_of`); or it was trained with another place
            of the strides.
    """
    part = detector_part(model)
    weights = read_weights(path)
    report = _fill(part, weights)
    faults, cautions = differences(weights.facts, facts_of(model))
    _check(report, weights, faults, partial)
    batch_norms = [m for m in part.modules() if isinstance(m, _BatchNorm)]
    if weights.folded_norms and batch_norms:
        cautions.append(
            "its batch norms were folded into affine layers, which only FrozenBN computes (yacs: "
            "MODEL.RESNETS.NORM FrozenBN); here they start with mean 0 and variance 1"
        )
    if weights.stages_differ() and _has_one_box_head(part):
        cautions.append(
            "the box heads of its stages differ, and here there is one for all stages: it starts "
            "from that of the first stage"
        )
    for text in cautions:
        logger.warning("%s: %s", path, text)
    logger.info(report.summary())
    return report


def check_fits(source: nn.Module, target: nn.Module, partial: bool = False) -> None:
    """Check, before anything is trained, that weights of a pre-training will load into a detector.

    Args:
        source: the pre-training model, which may be on the meta device.
        target: the detector, likewise; it is not changed.
        partial: see :func:`load_pretrained`.

    Raises:
        UserError: see :func:`load_pretrained`.
    """
    state = {
        name: tensor
        for name, tensor in source.state_dict().items()
        if name.startswith(tuple(f"{module}." for module in source.detector_modules))
    }
    names = {common_name(name): name for name in state}
    weights = Weights("the file", "", dict(zip(names, state.values(), strict=True)), names)
    weights.facts = facts_of(source)
    report = _fill(target, weights, load=False)
    _check(report, weights, differences(weights.facts, facts_of(target))[0], partial)


def _fill(model: nn.Module, weights: Weights, load: bool = True) -> TransferReport:
    """Load the tensors whose names and shapes fit, or find out which would be loaded."""
    ours = model.state_dict(keep_vars=True)
    found, unexpected = weights.fit(ours)
    fitting = {name: t for name, t in found.items() if t.shape == ours[name].shape}
    if load:
        first = {id(ours[name]): name for name in reversed(fitting)}  # of those that share a tensor
        model.load_state_dict({name: fitting[name] for name in first.values()}, strict=False)
    mismatched = [
        (name, tuple(tensor.shape), tuple(ours[name].shape))
        for name, tensor in found.items()
        if name not in fitting
    ]
    unexpected = [name for name in unexpected if not _DERIVED.search(name)]
    absent = {name for name in ours if name not in found and not _DERIVED.search(name)}
    report = _count(ours, absent, unexpected, mismatched, fitting)
    report.path, report.source, report.classes = weights.path, weights.title, weights.classes
    return report


def _has_one_box_head(model: nn.Module) -> bool:
    """Whether all stages have the same box head, or there is a single one."""
    state = model.state_dict(keep_vars=True)
    heads = {n: id(t) for n, t in state.items() if n.startswith("roi_heads.box_head.")}
    single = {BOX_HEAD_STAGE.sub("", name) for name in heads}
    return bool(heads) and len(set(heads.values())) == len(single)


def _count(
    ours: dict[str, Tensor],
    absent: set[str],
    unexpected: list[str],
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    loaded: dict[str, Tensor],
) -> TransferReport:
    report = TransferReport("", unexpected=unexpected, mismatched=mismatched)
    modules: dict[str, ModuleCount] = defaultdict(ModuleCount)
    for name, tensor in ours.items():
        if name not in loaded and _DERIVED.search(name):
            continue
        count = modules[module_of(name)]
        count.tensors += 1
        count.values += tensor.numel()
        if name in absent:
            report.missing.append(name)
        if name in loaded:
            report.matched.append(name)
            count.loaded_tensors += 1
            count.loaded_values += tensor.numel()
    report.modules = dict(modules)
    return report


def _check(report: TransferReport, weights: Weights, faults: list[str], partial: bool) -> None:
    wrong = [m for m in report.mismatched if not any(layer in m[0] for layer in CLASS_LAYERS)]
    if channels := _other_width(report, weights, wrong):
        raise UserError(
            f"{report.path}, read as {report.source}, is the detector's network with another "
            f"width: {channels[0]} channels after the stem instead of {channels[1]}. Use a "
            "detector with a trunk of the file's width, or the file of a trunk of this width"
        )
    if wrong:
        shown = "; ".join(
            f"{k}: {theirs} in the file, {ours} here" for k, theirs, ours in wrong[:3]
        )
        raise UserError(
            f"{report.path} has another architecture than the detector: "
            f"{len(wrong)} tensors differ in shape, e.g. {shown}. Pre-train with this detector's "
            "config, or fine-tune the detector that the checkpoint was written for"
        )
    for name, theirs, ours in report.mismatched:
        logger.warning("%s is not loaded: %s in the checkpoint, %s here", name, theirs, ours)
    if not report.matched:
        theirs = [*weights.names.values(), *weights.unused][:_EXAMPLES]
        raise UserError(
            f"no tensor of {report.path} fits the detector. The file was read as {report.source} "
            f"and has names such as {', '.join(theirs)}; the detector has "
            f"{', '.join(report.missing[:_EXAMPLES])}. Was it written for another kind of "
            "detector? If it was misread, append ?as=LIBRARY or ?part=NAME to the path"
        )
    if faults:
        raise UserError(f"{report.path} does not fit the detector: {'; '.join(faults)}")
    _check_groups(report, weights, partial)


def _other_width(
    report: TransferReport, weights: Weights, wrong: list[tuple[str, tuple, tuple]]
) -> tuple[int, int] | None:
    """Channels of the stem, in the file and here, if a library's ResNet differs only in widths."""
    stem = [both for name, *both in wrong if common_name(name) == "stem.conv1.weight"]
    if not stem or report.source.startswith("a Detectron2 model"):
        return None
    left = set(report.unexpected)
    extra = [k for k, name in weights.names.items() if name in left and _RESNET.match(k)]
    lacks = [name for name in report.missing if is_trunk(name)]
    kernels = [(theirs[2:], ours[2:]) for _, theirs, ours in wrong]
    if extra or lacks or any(theirs != ours for theirs, ours in kernels):
        return None
    return stem[0][0][0], stem[0][1][0]


def _check_groups(report: TransferReport, weights: Weights, partial: bool) -> None:
    """All or nothing in each group, in both directions."""
    loaded = Counter(map(group_of, report.matched))
    missing: dict[str, list[str]] = defaultdict(list)
    for name in report.missing:
        if not _ADDED.search(name):
            missing[group_of(name)].append(name)
    groups = {group_of(name): group_of(common_name(name)) for name in report.matched}
    left = set(report.unexpected)
    surplus: dict[str, list[str]] = defaultdict(list)
    for name in left & weights.unused.keys():  # layers that no network of Detectron2 has
        own = name.removeprefix(weights.prefix)
        if stage := re.match(r"(?:body\.)?layer([1-4])\.", own):
            surplus[f"res{int(stage[1]) + 1}"].append(name)
        elif stage := re.match(rf"{_STAGE}|blocks", own):  # of a transformer
            surplus[stage[0]].append(name)
    for common, name in weights.names.items():
        if name not in left or (weights.by_suffix and _BESIDE_STEM.fullmatch(common)):
            continue
        before = re.match(r"layers\.(\d+)\.downsample\.", common)  # computes the next stage's input
        if before and f"layers.{int(before[1]) + 1}" not in groups.values():
            continue
        surplus[group_of(common)].append(name)
    trunks = {module_of(name) for name in report.matched if is_trunk(name)}
    for group, names in missing.items():
        if group not in groups and module_of(names[0]) in trunks and is_trunk(names[0]):
            groups[group] = group_of(common_name(names[0]))  # a complete stage is missing
    for group, common_group in groups.items():
        lacks, extra = missing.get(group, []), surplus.get(common_group, [])
        if group == "roi_heads.box_head.fc":  # trained behind the convolutions of its head
            extra = extra + surplus.get("roi_heads.box_head.conv", [])
        if not lacks and not extra:
            continue
        total = loaded[group] + len(lacks)
        text = f"fills {loaded[group]} of the {total} tensors of {group}"
        if lacks:
            text += f" and lacks {', '.join(lacks[:_EXAMPLES])}"
        if extra:
            text += f" and has others there, such as {', '.join(extra[:_EXAMPLES])}"
        if not partial:
            raise UserError(
                f"{report.path} {text}: it comes from a detector of another depth, with other "
                "norms or with another head. Change the detector, or set train.init_partial=True "
                "to load what fits and train the rest from its initialisation"
            )
        logger.warning("%s %s", report.path, text)
