"""How well frozen region features tell classes apart, measured on ground-truth boxes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import detection_utils, get_detection_dataset_dicts
from detectron2.data import transforms as T
from detectron2.engine import HookBase
from detectron2.layers import ROIAlign
from detectron2.modeling.backbone import FPN
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes, BoxMode, ImageList
from detectron2.utils import comm
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.errors import UserError
from region_pretrain.evaluation.knn import knn_accuracy

logger = logging.getLogger(__name__)

TRUNK = "probe/knn_trunk"


@contextmanager
def evaluating(*modules: nn.Module | None) -> Iterator[None]:
    """Set modules to eval mode without gradients; afterwards each submodule has its old mode."""
    modes = {m: m.training for module in modules if module is not None for m in module.modules()}
    try:
        for module in modes:
            module.training = False
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


def region_features(
    backbone: nn.Module,
    box_pooler: nn.Module,
    box_head: nn.Module | None,
    in_features: Sequence[str],
    pixel_mean: Sequence[float] | Tensor,
    pixel_std: Sequence[float] | Tensor,
    input_format: str,
    dataset_dicts: Sequence[Mapping[str, Any]],
    batch_size: int = 8,
    device: torch.device | str | None = None,
    short_edge: int | None = 800,
    max_size: int = 1333,
) -> tuple[Tensor, Tensor]:
    """Features of the ground-truth boxes of a labelled data set, one vector a box.

    The images take the detector's way in testing: read in its format, resized, normalised, padded;
    then its backbone, its pooler and its head, all in eval mode. Crowd boxes are left out.

    Args:
        backbone: from (B, 3, H, W) to a dict of maps.
        box_pooler: the detector's ``ROIPooler``.
        box_head: from (R, C, S, S) to (R, D), or to maps that are averaged over space (res5 of a C4
            detector), or None: the pooled maps themselves, averaged.
        in_features: names of the maps that the pooler takes.
        pixel_mean: three numbers in 0-255, in the order of ``input_format``.
        pixel_std: the same.
        input_format: ``"RGB"`` or ``"BGR"``.
        dataset_dicts: with ``annotations``.
        batch_size: images at once.
        device: of the computation; None: where the backbone is.
        short_edge: the detector's ``ResizeShortestEdge`` in testing, in pixels; None: no resizing.
        max_size: longest side in pixels after resizing.

    Returns:
        (N, D) float32 and the boxes' ``category_id`` (N,) int64, both on the CPU, in the order of
        the data set.

    Raises:
        UserError: the data set has no boxes.
    """
    return _extract(
        RegionReader(backbone, box_pooler, {"only": box_head}, in_features),
        (pixel_mean, pixel_std, input_format),
        dataset_dicts,
        batch_size,
        device,
        (short_edge, max_size),
    )["only"]


class RegionReader(nn.Module):
    """Vectors of boxes, by name, out of one pass through a backbone.

    Args:
        backbone: from (B, 3, H, W) to a dict of maps; to anything, where only ``trunk`` is read.
        pooler: a ``ROIPooler``; None where there are no maps for one.
        heads: behind the pooler, by name of what they give; None: the pooled maps themselves.
        in_features: names of the maps that the pooler takes.
        trunk: the part of the backbone whose two last maps are read as ``"probe/knn_trunk"``:
            RoIAligned to 7x7, averaged over space, brought to length 1 each and put side by side.
            Every method has these, also one that knows no pyramid.
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
        """Of the vectors."""
        return [*([TRUNK] if self.trunk is not None else []), *self._by_name]

    def forward(self, images: Tensor, boxes: list[Boxes]) -> dict[str, Tensor]:
        """``(R, D)`` by name, for the R boxes of ``(B, 3, H, W)`` normalised images."""
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
    """What a detector or a pre-training model has to offer, under the probe's names.

    A model has ``backbone`` and perhaps, in ``roi_heads``, a pooler (``box_pooler`` or ``pooler``)
    and a head (``box_head``; C4: ``res5``). An FPN without a pooler gets one of 7x7.
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


def _extract(
    reader: RegionReader,
    pixels: tuple[Any, Any, str],
    dataset_dicts: Sequence[Mapping[str, Any]],
    batch_size: int,
    device: torch.device | str | None,
    size: tuple[int | None, int],
) -> dict[str, tuple[Tensor, Tensor]]:
    """As :func:`region_features`, for all vectors of a reader."""
    mean, std = (torch.as_tensor(v, dtype=torch.float32).reshape(3, 1, 1).cpu() for v in pixels[:2])
    backbone = reader.backbone
    device = next(backbone.parameters()).device if device is None else torch.device(device)
    features: dict[str, list[Tensor]] = {name: [] for name in reader.names}
    labels: list[int] = []
    labelled = (d for d in dataset_dicts if any(_counts(a) for a in d.get("annotations", ())))
    with evaluating(reader):
        while chunk := list(itertools.islice(labelled, batch_size)):
            loaded = [_load(d, pixels[2], *size) for d in chunk]
            images = ImageList.from_tensors(
                [((image - mean) / std).to(device) for image, _, _ in loaded],
                getattr(backbone, "size_divisibility", 0),
                padding_constraints=getattr(backbone, "padding_constraints", None),
            )
            boxes = [Boxes(b).to(device) for _, b, _ in loaded]
            for name, vectors in reader(images.tensor, boxes).items():
                features[name].append(vectors.float().cpu())
            labels += itertools.chain.from_iterable(classes for _, _, classes in loaded)
    if not labels:
        raise UserError("the kNN probe needs images with labelled boxes, and found none")
    return {name: (torch.cat(parts), torch.tensor(labels)) for name, parts in features.items()}


def _counts(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0)


def _load(
    record: Mapping[str, Any], input_format: str, short_edge: int | None, max_size: int
) -> tuple[Tensor, Tensor, list[int]]:
    """An image (3, H, W) float32 in 0-255, its boxes (R, 4) XYXY in it, and their classes."""
    image = detection_utils.read_image(record["file_name"], format=input_format)
    annotations = [a for a in record["annotations"] if _counts(a)]
    boxes = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations],
        dtype=np.float32,
    ).reshape(-1, 4)
    if short_edge is not None:
        # ResizeShortestEdge itself would draw a random number.
        height, width = image.shape[:2]
        new = T.ResizeShortestEdge.get_output_shape(height, width, short_edge, max_size)
        transform = T.ResizeTransform(height, width, *new)
        image, boxes = transform.apply_image(image), transform.apply_box(boxes)
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32))
    return image, boxes, [a["category_id"] for a in annotations]


class KNNProbeHook(HookBase):
    """Log the kNN accuracy of frozen region features: a useless run shows within minutes.

    ``probe/knn_trunk`` reads the trunk's last maps, which every method trains; ``probe/knn_fpn``
    the pooled FPN maps and ``probe/knn_head`` what the box head makes of them, where a model has
    these (:func:`model_reader`). It works on detectors and on pre-training models alike.

    A run with the probe is the same as one without: it draws no random number and restores every
    mode. With several processes each takes its part of the images. Put it before the writers::

        train.hooks = [L(KNNProbeHook)(period=500, train_names="shapes_train", short_edge=None)]

    Args:
        period: in iterations; the probe also runs after the last one.
        train_names: registered data sets whose boxes vote.
        val_names: registered data sets whose boxes are classified. Left out, each box of
            ``train_names`` is classified by all others.
        k: number of neighbours.
        max_images: take the first images only, of each of the two.
        batch_size: images at once.
        short_edge: as for :func:`region_features`.
        max_size: as for :func:`region_features`.
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
        """Read the lists now: a wrong name shall not end a run at its first probe."""
        self._dicts = [self._read(names) for names in self._names if names]

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if done == self.trainer.max_iter or (self._period > 0 and done % self._period == 0):
            accuracies = self.probe(self.trainer.model)
            self.trainer.storage.put_scalars(**accuracies, smoothing_hint=False)

    def probe(self, model: nn.Module) -> dict[str, float]:
        """Accuracies in [0, 1] by name of the features; the same on all processes."""
        if isinstance(model, DistributedDataParallel):
            model = model.module
        reader = model_reader(model)
        sets = [self._extract(model, reader, dicts) for dicts in self._dicts]
        result = {}
        for name in reader.names:
            train, *val = (features[name] for features in sets)
            result[name] = knn_accuracy(*train, *itertools.chain.from_iterable(val), k=self._k)
        counts = " and ".join(str(len(features[reader.names[0]][1])) for features in sets)
        text = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        logger.info("kNN of %s boxes: %s", counts, text)
        return result

    def _extract(self, model, reader, dicts) -> dict[str, tuple]:
        rank, world = comm.get_rank(), comm.get_world_size()
        mine = dicts[rank::world]
        found = {}
        if mine:
            found = _extract(reader, _pixels(model), mine, self._batch_size, None, self._size)
        parts = [part for part in comm.all_gather(found) if part]
        return {
            name: tuple(
                torch.cat(tensors) for tensors in zip(*(p[name] for p in parts), strict=True)
            )
            for name in reader.names
        }

    def _read(self, names: list[str]) -> list[dict[str, Any]]:
        dicts = get_detection_dataset_dicts(names)[: self._max_images]
        dicts = [d for d in dicts if any(_counts(a) for a in d.get("annotations", ()))]
        if not dicts:
            raise UserError(f"the kNN probe needs labelled boxes, and {', '.join(names)} have none")
        return dicts


def _as_list(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _first(module: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _in_features(model: nn.Module, roi_heads: nn.Module, pooler: nn.Module) -> list[str]:
    """Names of the maps that the pooler takes: the detector's, else the model's, else P-levels."""
    for owner in (roi_heads, model):
        names = getattr(owner, "in_features", ())
        if len(names) == len(pooler.level_poolers):
            return list(names)
    return [f"p{level}" for level in range(pooler.min_level, pooler.max_level + 1)]


def _pixels(model: nn.Module) -> tuple[Tensor, Tensor, str]:
    """Mean, standard deviation and channel order, from whichever part of the model holds them."""
    owner = next((m for m in model.modules() if hasattr(m, "pixel_mean")), None)
    if owner is None:
        raise UserError(f"the kNN probe finds no pixel_mean in {type(model).__name__}")
    flipped = getattr(owner, "flip_channels", False)
    order = getattr(owner, "input_format", None) or ("BGR" if flipped else "RGB")
    return owner.pixel_mean, owner.pixel_std, order
