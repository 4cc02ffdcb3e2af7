"""Loads pre-trained weights into a detector and reports what was and was not loaded."""

from __future__ import annotations

import logging
import pickle
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import get_missing_parameters_message
from tabulate import tabulate
from torch import nn

from region_pretrain.engine.safe_pickle import check_pickle
from region_pretrain.errors import UserError
from region_pretrain.modeling.meta_arch import PretrainingModel

logger = logging.getLogger(__name__)

#: Layers whose shape depends on the number of classes: if it differs, they are not loaded.
CLASS_LAYERS = (".box_predictor.", ".mask_head.predictor.", ".cls_score.")
#: A checkpoint that fills less than this fraction of a module's tensors is the wrong one.
MIN_FILLED = 0.5
_EXAMPLES = 3


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

    ``num_batches_tracked`` counters that only one side has are left out.

    Attributes:
        path: path of the checkpoint.
        matched: loaded tensors.
        missing: tensors of the model that the checkpoint lacks; they keep their values.
        unexpected: tensors of the checkpoint that the model lacks.
        mismatched: (name, shape in the checkpoint, shape in the model) of tensors that were not
            loaded because their shapes differ.
        modules: counts per module, in the model's order.
        classes: the names of the classes that the checkpoint was trained on; empty if unknown.
    """

    path: str
    matched: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    modules: dict[str, ModuleCount] = field(default_factory=dict)
    classes: list[str] = field(default_factory=list)

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
            f"weights from {self.path}",
            tabulate(
                rows,
                headers=["module", "tensors", "values", ""],
                colalign=("left", "right", "right", "left"),
            ),
        ]
        if self.unexpected:
            unused = Counter(module_of(name) for name in self.unexpected)
            text = ", ".join(f"{name} ({n})" for name, n in unused.items())
            lines.append(f"not used by this model: {text}")
        return "\n".join(lines)


def module_of(name: str) -> str:
    """The module of a detector that a tensor belongs to, e.g. ``"roi_heads.box_head"``.

    This is the top-level module. RoI heads, and a backbone with a feature pyramid, are divided
    further into what pre-training can fill separately, e.g. ``backbone.bottom_up``,
    ``backbone.fpn``.
    """
    parts = name.split(".")
    if parts[0] == "roi_heads":
        return ".".join(parts[:2])
    if parts[0] == "backbone" and len(parts) > 1:
        if parts[1] in ("bottom_up", "net", "top_block"):
            return ".".join(parts[:2])
        if parts[1].startswith(("fpn_", "simfp_")):
            return "backbone.fpn"
    return parts[0]


def load_pretrained(model: nn.Module, path: str) -> TransferReport:
    """Load a checkpoint into a detector, and check that it fits.

    :class:`detectron2.checkpoint.DetectionCheckpointer` does the loading: model-zoo ``.pkl`` files,
    ``?matching_heuristics=True`` and all paths that ``PathManager`` supports work as usual. A
    checkpoint of this library has the detector's tensors under ``"model"``.

    Args:
        model: the detector, not wrapped in DDP; filled in place. Of a pre-training model only the
            ``detector_modules`` are filled.
        path: checkpoint file or URL.

    Returns:
        What was loaded; its summary has been logged.

    Raises:
        UserError: the file is missing, damaged, not a checkpoint, or contains code; no tensor of
            it fits; shapes differ in other layers than those that depend on the number of classes;
            or it fills less than half of a module's tensors.
    """
    checkpointer = _ReportingCheckpointer(_detector_part(model))
    if not path:
        raise UserError("no checkpoint to load: the path is empty (train.init_checkpoint)")
    try:
        checkpointer.load(path, checkpointables=[])
    except UserError:
        raise
    except (AssertionError, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UserError(f"cannot read the checkpoint {path}: {_why(error)}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"cannot read the checkpoint {path}: {_why(error)}") from error
    report = checkpointer.report
    report.path, report.classes = path, checkpointer.classes
    _check(report, checkpointer.keys)
    logger.info(report.summary())
    return report


def _detector_part(model: nn.Module) -> nn.Module:
    """The model without what only pre-training needs: the target network also has the detector's
    names, which would be ambiguous for the matching heuristics."""
    if not isinstance(model, PretrainingModel):
        return model
    part = nn.Module()
    for name in model.detector_modules:
        part.add_module(name, model.get_submodule(name))
    return part


class _ReportingCheckpointer(DetectionCheckpointer):
    """DetectionCheckpointer that never runs code from a file and records what it loaded."""

    def __init__(self, model: nn.Module):
        super().__init__(model, save_to_disk=False)
        self.report = TransferReport(path="")
        self.keys: list[str] = []  # the checkpoint's names, as in the file
        self.classes: list[str] = []
        self._weights: dict[str, torch.Tensor] = {}

    def _load_file(self, filename: str) -> dict[str, Any]:
        if filename.endswith(".pkl"):
            check_pickle(filename)
        loaded = super()._load_file(filename)
        weights = loaded["model"]
        if not isinstance(weights, dict) or not weights:
            raise UserError(f"{filename} is not a checkpoint: 'model' contains no named tensors")
        odd = [str(k) for k, v in weights.items() if not hasattr(v, "shape")]
        if odd:
            hint = ", ".join(sorted(odd)[:6])
            nested = [k for k in odd if isinstance(weights[k], dict)]
            where = f"the weights seem to be in {nested[0]!r}: " if nested else ""
            raise UserError(
                f"{filename} has no weights under 'model', but entries such as {hint}; "
                f"{where}save them as {{'model': state_dict}} with the detector's names"
            )
        self.keys = [str(k) for k in weights]
        self.classes = [str(name) for name in loaded.get("thing_classes", ())]
        return loaded

    def _torch_load(self, f: str) -> dict[str, Any]:
        loaded = torch.load(f, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise UserError(
                f"{f} is not a checkpoint: it contains a {type(loaded).__name__}, not a dict"
            )
        return loaded

    def _convert_ndarray_to_tensor(self, state_dict: dict[str, Any]) -> None:
        super()._convert_ndarray_to_tensor(state_dict)
        self._weights = state_dict  # the last call has the names after the matching heuristics

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        ours = self.model.state_dict()
        unexpected = [k for k in incompatible.unexpected_keys if not _is_counter(k)]
        mismatched = list(incompatible.incorrect_shapes)
        absent = {*incompatible.missing_keys} - {name for name, _, _ in mismatched}
        absent = {k for k in absent if not _is_counter(k)}
        # The matching heuristics do not rename a tensor whose shape differs.
        heuristics = checkpoint.get("matching_heuristics", False)
        for name in list(unexpected) if heuristics else []:
            for key in sorted(absent):
                theirs, here = tuple(self._weights[name].shape), tuple(ours[key].shape)
                if key.endswith("." + name) and theirs != here:
                    mismatched.append((key, theirs, here))
                    absent.remove(key)
                    unexpected.remove(name)
                    break
        # Batch norm creates the counter that old files lack; it was not loaded.
        counters = {k for k in ours if _is_counter(k) and k not in self._weights}
        not_loaded = counters.union(incompatible.missing_keys)
        self.report = _count(ours, absent, unexpected, mismatched, not_loaded)
        return incompatible

    def _log_incompatible_keys(self, incompatible) -> None:
        """Nothing: the report logs them."""


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def _count(
    ours: dict[str, torch.Tensor],
    absent: set[str],
    unexpected: list[str],
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]],
    not_loaded: set[str],
) -> TransferReport:
    report = TransferReport("", unexpected=unexpected, mismatched=mismatched)
    skipped = not_loaded.union(name for name, _, _ in mismatched)
    modules: dict[str, ModuleCount] = defaultdict(ModuleCount)
    for name, tensor in ours.items():
        if name in skipped and _is_counter(name):
            continue
        count = modules[module_of(name)]
        count.tensors += 1
        count.values += tensor.numel()
        if name in absent:
            report.missing.append(name)
        if name not in skipped:
            report.matched.append(name)
            count.loaded_tensors += 1
            count.loaded_values += tensor.numel()
    report.modules = dict(modules)
    return report


def _check(report: TransferReport, keys: list[str]) -> None:
    wrong = [m for m in report.mismatched if not any(layer in m[0] for layer in CLASS_LAYERS)]
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
        here = report.missing[:_EXAMPLES]
        raise UserError(
            f"no tensor of {report.path} fits the detector. The file has names such as "
            f"{', '.join(keys[:_EXAMPLES])}; the detector has {', '.join(here)}. "
            + _likely_cause(keys)
        )
    for module, count in report.modules.items():
        if count.loaded_tensors in (0, count.tensors):
            continue
        missing = [k for k in report.missing if module_of(k) == module]
        if count.loaded_tensors < MIN_FILLED * count.tensors:
            raise UserError(
                f"{report.path} fills only {count.loaded_tensors} of the {count.tensors} tensors "
                f"of {module}; it lacks, e.g., {', '.join(missing[:_EXAMPLES])}. Does it come from "
                "a model of another depth or with another head?"
            )
        if missing:
            logger.warning(
                "%s is only partly loaded (%d of %d tensors). %s",
                *(module, count.loaded_tensors, count.tensors),
                get_missing_parameters_message(missing),
            )


def _likely_cause(keys: list[str]) -> str:
    if any(k.startswith(("layer1.", "conv1.", "backbone.layer1.")) for k in keys):
        return "These are torchvision's names: convert the file to Detectron2's names first"
    if any(".layer1." in k or "encoder_q." in k for k in keys):
        return "These are the names of a self-supervised release: convert the file first"
    if all("." in k for k in keys) and any(k.startswith(("stem.", "res2.")) for k in keys):
        return "These are a bare backbone's names: append ?matching_heuristics=True to the path"
    return "Was it written for another detector, or saved with a prefix?"


def _why(error: Exception) -> str:
    text = str(error).strip()
    if "Weights only load failed" in text:
        code = re.search(r"Unsupported global: GLOBAL (\S+)", text)
        if code:
            return f"it contains Python objects ({code[1]}), which are not loaded for safety"
        return "it is damaged, or not a checkpoint"
    return text.splitlines()[0][:300] if text else type(error).__name__
