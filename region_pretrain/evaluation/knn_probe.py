"""A kNN probe of frozen region features on ground-truth boxes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from detectron2.layers import ROIAlign
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes, BoxMode, ImageList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.data.catalog import check_registered
from region_pretrain.errors import UserError
from region_pretrain.evaluation.knn import knn_accuracy
from region_pretrain.images import read_record

logger = logging.getLogger(__name__)

TRUNK = "probe/knn_trunk"


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Set modules to eval mode without gradients; restores the mode of each submodule."""
    modes = {m: m.training for module in modules if module is not None for m in module.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class RegionReader(nn.Module):
    """Computes feature vectors of boxes from one pass through a backbone.

    Args:
        backbone: maps (B, 3, H, W) to a dict of feature maps; unused except for its trunk if there
            is no pooler.
        pooler: a ``ROIPooler``; None: only the trunk is read.
        heads: name -> module applied after the pooler, from (R, C, S, S) to (R, D), or to maps that
            are averaged over space, as res5 of a C4 detector; None: the pooled maps, averaged.
        in_features: names of the pooler's input maps.
        trunk: the part of the backbone whose last two maps give ``"probe/knn_trunk"``: RoIAligned
            to 7x7, averaged over space, L2-normalised and concatenated. All methods have these
            maps, including those without a pyramid.
    """

    def __init__(
        self,
        backbone: nn.Module,
        pooler: nn.Module | None,
        heads: Mapping[str, nn.Module | None],
        in_features: Sequence[str] = (),
        trunk: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.pooler = backbone, pooler
        self.heads = nn.ModuleList(head for head in heads.values() if head is not None)
        self.trunk = trunk
        self._by_name = dict(heads)
        self._in_features = list(in_features)

    @property
    def names(self) -> list[str]:
        """Names of the vectors."""
        return [*([TRUNK] if self.trunk is not None else []), *self._by_name]

    def forward(self, images: Tensor, boxes: list[Boxes]) -> dict[str, Tensor]:
        """Vectors ``(R, D)`` by name, for all R boxes of ``(B, 3, H, W)`` normalised images."""
        kept: dict[str, Tensor] = {}
        found: dict[str, Tensor] = {}
        handle = None
        if self.trunk is not None:
            handle = self.trunk.register_forward_hook(lambda m, args, maps: kept.update(maps))
        try:
            maps = self.backbone(images)
        finally:
            if handle is not None:
                handle.remove()
        if self.trunk is not None:
            found[TRUNK] = self._read_trunk(kept, boxes)
        if self.pooler is not None:
            pooled = self.pooler([maps[name] for name in self._in_features], boxes)  # (R, C, S, S)
            for name, head in self._by_name.items():
                vectors = pooled if head is None else head(pooled)
                found[name] = vectors.mean(dim=(2, 3)) if vectors.dim() == 4 else vectors
        return found

    def _read_trunk(self, maps: Mapping[str, Tensor], boxes: list[Boxes]) -> Tensor:
        strides = {name: shape.stride for name, shape in self.trunk.output_shape().items()}
        rois = convert_boxes_to_pooler_format(boxes)
        parts = []
        for name in sorted(strides, key=strides.get)[-2:]:
            pooled = ROIAlign(7, 1 / strides[name], sampling_ratio=0, aligned=True)(
                maps[name], rois
            )
            parts.append(F.normalize(pooled.mean(dim=(2, 3)), dim=1))
        return torch.cat(parts, dim=1)


def model_reader(model: nn.Module) -> RegionReader:
    """The reader of everything that a detector or a pre-training model has.

    The model has a ``backbone``, and possibly, in ``roi_heads`` or itself, a pooler (``box_pooler``
    or ``pooler``) and a head (``box_head``; C4: ``res5``). An FPN without pooler gets one of 7x7.
    """
    backbone = model.backbone
    trunk = getattr(backbone, "bottom_up", backbone)
    roi_heads = getattr(model, "roi_heads", model)
    pooler = _first(roi_heads, "box_pooler", "pooler")
    if pooler is None and isinstance(backbone, FPN):
        strides = [shape.stride for shape in backbone.output_shape().values()]
        scales = [1 / stride for stride in strides[: len(backbone.in_features)]]  # no top block
        pooler = ROIPooler(7, scales, sampling_ratio=0, pooler_type="ROIAlignV2")
    heads: dict[str, nn.Module | None] = {}
    if pooler is not None:
        heads["probe/knn_fpn"] = None
        if (head := _first(roi_heads, "box_head", "res5")) is not None:
            heads["probe/knn_head"] = head
    in_features = () if pooler is None else _in_features(model, roi_heads, pooler)
    return RegionReader(backbone, pooler, heads, in_features, trunk)


def _counts(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0)


def _load(
    record: Mapping[str, Any], input_format: str, short_edge: int | None, max_size: int
) -> tuple[Tensor, Tensor, list[int]]:
    """An image (3, H, W) float32 in 0-255, its boxes (R, 4) XYXY in pixels, and their classes."""
    image = read_record(record, input_format)
    annotations = [a for a in record["annotations"] if _counts(a)]
    boxes = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations],
        dtype=np.float32,
    ).reshape(-1, 4)
    if short_edge is not None:
        # The augmentation ResizeShortestEdge itself would draw a random number.
        height, width = image.shape[:2]
        new = T.ResizeShortestEdge.get_output_shape(height, width, short_edge, max_size)
        transform = T.ResizeTransform(height, width, *new)
        image, boxes = transform.apply_image(image), transform.apply_box(boxes)
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32))
    return image, boxes, [a["category_id"] for a in annotations]


class KNNProbeHook(HookBase):
    """Logs the kNN accuracy of frozen features of ground-truth boxes during a run.

    It shows within minutes whether a pre-training learns anything. ``probe/knn_trunk`` classifies
    features of the trunk's last maps, which all methods train; ``probe/knn_fpn`` those of the
    pooled FPN maps and ``probe/knn_head`` those of the box head, if the model has them (see
    :func:`model_reader`). It works with detectors and with pre-training models.

    The images are processed as by the detector at test time: read in its format, resized,
    normalised and padded, with all modules in eval mode. Crowd boxes are left out. A run with the
    probe equals one without: the probe draws no random numbers and restores all modes. With several
    processes, each one processes its part of the images::

        train.hooks = [L(KNNProbeHook)(period=500, train_names="shapes_train", short_edge=None)]

    Args:
        period: in iterations; 0: only before the first step, which every new run logs as iteration
            0, and after the last step.
        train_names: data sets whose boxes vote, registered or named by path.
        val_names: data sets whose boxes are classified; empty: each box of ``train_names`` is
            classified by all others.
        k: number of neighbours.
        max_images: use only the first images of both; None: all.
        batch_size: images per batch.
        short_edge: the detector's ``ResizeShortestEdge`` at test time, in pixels; None: no
            resizing.
        max_size: maximum length of the longer side in pixels after resizing.
    """

    def __init__(
        self,
        period: int,
        train_names: str | Sequence[str],
        val_names: str | Sequence[str] = (),
        k: int = 20,
        max_images: int | None = None,
        batch_size: int = 8,
        short_edge: int | None = 800,
        max_size: int = 1333,
    ) -> None:
        self._period = period
        self._names = _as_list(train_names), _as_list(val_names)
        self._k = k
        self._max_images = max_images
        self._batch_size = batch_size
        self._size = short_edge, max_size

    def before_train(self) -> None:
        # The data sets are read first: a wrong name must not end a run at its first probe.
        self._dicts = [self._read(names) for names in self._names if names]
        if self.trainer.start_iter == 0:
            self._log()

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        # Iteration 0 has the values before the first step.
        due = self._period > 0 and done % self._period == 0 and done > 1
        if due or done == self.trainer.max_iter:
            self._log()

    def _log(self) -> None:
        accuracies = self.probe(self.trainer.model)
        self.trainer.storage.put_scalars(**accuracies, smoothing_hint=False)

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Accuracies in [0, 1] by metric name, the same on all processes."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        reader = model_reader(model)
        sets = [self._features(model, reader, dicts) for dicts in self._dicts]
        result = {}
        for name in reader.names:
            train, *val = (features[name] for features in sets)
            result[name] = knn_accuracy(*train, *itertools.chain.from_iterable(val), k=self._k)
        counts = " and ".join(str(len(features[reader.names[0]][1])) for features in sets)
        text = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        logger.info("kNN of %s boxes: %s", counts, text)
        return result

    def _features(
        self, model: nn.Module, reader: RegionReader, dicts: Sequence[Mapping[str, Any]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Vectors (N, D) and classes (N,) of all processes' boxes, on the CPU, by metric name."""
        mine = self._local_features(model, reader, dicts[comm.get_rank() :: comm.get_world_size()])
        parts = [part for part in comm.all_gather(mine) if len(part[1])]
        labels = torch.cat([labels for _, labels in parts])
        return {
            name: (torch.cat([vectors[name] for vectors, _ in parts]), labels)
            for name in reader.names
        }

    def _local_features(
        self, model: nn.Module, reader: RegionReader, dicts: Sequence[Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], Tensor]:
        backbone, device = reader.backbone, next(reader.backbone.parameters()).device
        mean, std, input_format = _pixels(model)
        vectors: dict[str, list[Tensor]] = {name: [] for name in reader.names}
        labels: list[int] = []
        with evaluating(reader):
            for start in range(0, len(dicts), self._batch_size):
                chunk = dicts[start : start + self._batch_size]
                loaded = [_load(record, input_format, *self._size) for record in chunk]
                images = ImageList.from_tensors(
                    [((image - mean) / std).to(device) for image, _, _ in loaded],
                    getattr(backbone, "size_divisibility", 0),
                    padding_constraints=getattr(backbone, "padding_constraints", None),
                )
                boxes = [Boxes(boxes).to(device) for _, boxes, _ in loaded]
                for name, found in reader(images.tensor, boxes).items():
                    vectors[name].append(found.float().cpu())
                labels += itertools.chain.from_iterable(classes for _, _, classes in loaded)
        return {n: torch.cat(v) for n, v in vectors.items() if v}, torch.tensor(labels)

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        for name in names:
            check_registered(name)
        dicts = get_detection_dataset_dicts(names)[: self._max_images]
        dicts = [d for d in dicts if any(_counts(a) for a in d.get("annotations", ()))]
        if not dicts:
            raise UserError(f"the kNN probe needs labelled boxes: {', '.join(names)} has none")
        return dicts


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _first(module: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _in_features(model: nn.Module, roi_heads: nn.Module, pooler: nn.Module) -> list[str]:
    """Names of the pooler's input maps: the detector's, else the model's, else the P-levels."""
    for owner in (roi_heads, model):
        names = getattr(owner, "in_features", ())
        if len(names) == len(pooler.level_poolers):
            return list(names)
    return [f"p{level}" for level in range(pooler.min_level, pooler.max_level + 1)]


def _pixels(model: nn.Module) -> tuple[Tensor, Tensor, str]:
    """Mean and std (3, 1, 1) on the CPU and the channel order, from the module that has them."""
    owner = next((m for m in model.modules() if hasattr(m, "pixel_mean")), None)
    if owner is None:
        raise UserError(f"the kNN probe finds no pixel_mean in {type(model).__name__}")
    flipped = getattr(owner, "flip_channels", False)
    order = getattr(owner, "input_format", None) or ("BGR" if flipped else "RGB")
    mean, std = (
        torch.as_tensor(v, dtype=torch.float32).reshape(3, 1, 1).cpu()
        for v in (owner.pixel_mean, owner.pixel_std)
    )
    return mean, std, order
