"""Frozen features of ground-truth boxes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.data import transforms as T
from detectron2.layers import CycleBatchNormList, ROIAlign
from detectron2.modeling.poolers import ROIPooler, convert_boxes_to_pooler_format
from detectron2.structures import Boxes, BoxMode, ImageList
from detectron2.utils import comm
from torch import Tensor, nn

from region_pretrain.convert.facts import facts_of
from region_pretrain.engine.kernels import without_cudnn_benchmark
from region_pretrain.errors import UserError
from region_pretrain.images import read_record, size_mismatch
from region_pretrain.modeling.given import training_modes_kept
from region_pretrain.modeling.preprocess import channel_order
from region_pretrain.modeling.pyramid import pyramid_names, trunk_of
from region_pretrain.random_state import random_state_of

#: Levels of a :class:`RegionReader`; those of a cascade's box heads end with the stage's number.
TRUNK, FPN, TOWER, HEAD = "trunk", "fpn", "tower", "head"


class Regions(NamedTuple):
    """The regions of a data set.

    Attributes:
        features: level -> vectors (N, D), on the CPU.
        labels: classes (N,), int64.
        images: positions of the regions' images in the data set (N,), int64.
    """

    features: dict[str, Tensor]
    labels: Tensor
    images: Tensor


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Set a module to eval mode without gradients; restores the mode of each submodule.

    Images of any shape may pass (:func:`~region_pretrain.engine.kernels.without_cudnn_benchmark`).
    """
    with training_modes_kept(module), torch.no_grad(), without_cudnn_benchmark():
        for part in module.modules():
            part.training = False
        yield


class RegionReader(nn.Module):
    """Computes feature vectors of boxes from one pass through a backbone.

    Args:
        backbone: maps (B, 3, H, W) to a dict of feature maps; unused except for its trunk if there
            is no pooler.
        trunk: the part of the backbone whose last two maps are the level ``trunk``: RoIAligned to
            7x7, averaged over space, L2-normalised and concatenated. All methods have these maps,
            including those without a pyramid.
        pooler: a ``ROIPooler``, whose maps averaged over space are the level ``fpn``; None: only
            the trunk is read.
        in_features: names of the pooler's input maps.
        heads: level -> module applied after the pooler, from (R, C, S, S) to (R, D), or to maps
            that are averaged over space, as res5 of a C4 detector.
        tower: applied to each map before the pooler, for the level ``tower``; None: no such level.
    """

    def __init__(
        self,
        backbone: nn.Module,
        trunk: nn.Module,
        pooler: nn.Module | None = None,
        in_features: Sequence[str] = (),
        heads: Mapping[str, nn.Module] | None = None,
        tower: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.trunk, self.pooler, self.tower = backbone, trunk, pooler, tower
        self.heads = nn.ModuleDict(heads or {})
        self._in_features = list(in_features)

    @property
    def levels(self) -> list[str]:
        """Names of the levels, from the trunk to the heads."""
        tower = [TOWER] if self.tower is not None else []
        return [TRUNK, *([FPN, *tower] if self.pooler is not None else []), *self.heads]

    def parameters_of(self, level: str) -> set[nn.Parameter]:
        """The parameters of a level that the trunk lacks; the trunk's if there are none."""
        trunk = set(self.trunk.parameters())
        if level == FPN:
            coarser = getattr(self.backbone, "top_block", None)  # whose maps are not pooled
            unread = set() if coarser is None else set(coarser.parameters())
            return set(self.backbone.parameters()) - trunk - unread or trunk
        module = {TRUNK: self.trunk, TOWER: self.tower}.get(level)
        return set((self.heads[level] if module is None else module).parameters())

    def forward(self, images: Tensor, boxes: list[Boxes]) -> dict[str, Tensor]:
        """Vectors ``(R, D)`` by level, for all R boxes of ``(B, 3, H, W)`` normalised images."""
        kept: dict[str, Tensor] = {}
        handle = self.trunk.register_forward_hook(lambda m, args, maps: kept.update(maps))
        try:
            maps = self.backbone(images)
        finally:
            handle.remove()
        found = {TRUNK: self._read_trunk(kept, boxes)}
        if self.pooler is not None:
            inputs = [maps[name] for name in self._in_features]
            pooled = self.pooler(inputs, boxes)  # (R, C, S, S)
            found[FPN] = pooled.mean(dim=(2, 3))
            if self.tower is not None:
                found[TOWER] = self.pooler(self._tower_maps(inputs), boxes).mean(dim=(2, 3))
            for name, head in self.heads.items():
                vectors = head(pooled)
                found[name] = vectors.mean(dim=(2, 3)) if vectors.dim() == 4 else vectors
        return found

    def _tower_maps(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tower's maps; norms that have statistics per level count from the first one."""
        norms = [m for m in self.tower.modules() if isinstance(m, CycleBatchNormList)]
        before = [norm._pos for norm in norms]
        try:
            for norm in norms:
                norm._pos = 0
            return [self.tower(x) for x in inputs]
        finally:
            for norm, position in zip(norms, before, strict=True):
                norm._pos = position

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
    or ``pooler``) and a head (``box_head``, which may be the list of a cascade; C4: ``res5``). A
    pyramid without pooler, as of RetinaNet and FCOS, gets one of 7x7; their classification tower is
    a level too.

    Raises:
        UserError: the model has no ``backbone``.
    """
    backbone = getattr(model, "backbone", None)
    if backbone is None:
        raise UserError(
            f"a probe needs a model with a backbone, and {type(model).__name__} has none"
        )
    trunk = trunk_of(backbone)
    roi_heads = getattr(model, "roi_heads", model)
    pooler = _first(roi_heads, "box_pooler", "pooler")
    if pooler is not None:
        in_features = _in_features(model, roi_heads, pooler)
    elif trunk is not backbone and hasattr(backbone, "output_shape"):
        pooler, in_features = _pyramid_pooler(backbone)
    else:
        return RegionReader(backbone, trunk)
    if not set(in_features) <= set(backbone.output_shape()):  # they are computed from the trunk
        return RegionReader(backbone, trunk)
    head = _first(roi_heads, "box_head", "res5")
    if isinstance(head, nn.ModuleList):
        heads = {f"{HEAD}_stage{i}": stage for i, stage in enumerate(head)}
    else:
        heads = {} if head is None else {HEAD: head}
    tower = getattr(getattr(model, "head", None), "cls_subnet", None)
    return RegionReader(backbone, trunk, pooler, in_features, heads, tower)


def read_regions(
    model: nn.Module,
    reader: RegionReader,
    dicts: Sequence[Mapping[str, Any]],
    augmentations: Sequence[T.Augmentation] = (),
    batch_size: int = 8,
    input_format: str | None = None,
    everywhere: bool = True,
) -> Regions | None:
    """Features of the boxes of images, each process reading its part of the batches.

    The images are processed as by the detector at test time: read in its format, resized,
    normalised and padded, with all modules in eval mode. Crowd boxes are left out. Random states
    and modes are restored.

    Args:
        model: has the ``pixel_mean`` and ``pixel_std`` of the reader's backbone in a submodule.
        reader: see :func:`model_reader`.
        dicts: Detectron2 dataset dicts with annotations.
        augmentations: Detectron2's, such as the test mapper's ``ResizeShortestEdge``.
        batch_size: images per batch.
        input_format: channel order that the model reads; None: the model's own, see
            :func:`~region_pretrain.modeling.preprocess.channel_order`.
        everywhere: return the regions on all processes, each of which then has them in memory.

    Returns:
        The regions of all processes, in the order of the images; without ``everywhere`` None on all
        processes but the main one.
    """
    starts = range(0, len(dicts), batch_size)
    batches = [(start, dicts[start : start + batch_size]) for start in starts]
    rank, world = comm.get_rank(), comm.get_world_size()
    mine = _local_regions(model, reader, batches[rank::world], augmentations, input_format)
    gathered = comm.all_gather(mine) if everywhere else comm.gather(mine)
    if not gathered:
        return None
    parts = [part for part in gathered if part]
    # The n-th batch of each process, for all n.
    batches = [part[n] for n in range(len(parts[0])) for part in parts if n < len(part)]
    return Regions(
        {level: torch.cat([b.features[level] for b in batches]) for level in reader.levels},
        torch.cat([b.labels for b in batches]),
        torch.cat([b.images for b in batches]),
    )


def _local_regions(
    model: nn.Module,
    reader: RegionReader,
    batches: Sequence[tuple[int, Sequence[Mapping[str, Any]]]],
    augmentations: Sequence[T.Augmentation],
    input_format: str | None,
) -> list[Regions]:
    backbone, device = reader.backbone, next(reader.backbone.parameters()).device
    facts = facts_of(model)
    if facts.pixel_mean is None:
        raise UserError(f"the probe finds no pixel_mean in {type(model).__name__}")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (facts.pixel_mean, facts.pixel_std))
    input_format = input_format or channel_order(facts.input_format, facts.pixel_mean)
    found = []
    # A compiled trunk would be compiled for each shape, and would not see the hook.
    with evaluating(reader), torch.compiler.set_stance("force_eager"):
        for start, batch in batches:
            loaded = [load_region(record, input_format, augmentations) for record in batch]
            images = ImageList.from_tensors(
                [((image - mean) / std).to(device) for image, _, _ in loaded],
                getattr(backbone, "size_divisibility", 0),
                padding_constraints=getattr(backbone, "padding_constraints", None),
            )
            boxes = [Boxes(boxes).to(device) for _, boxes, _ in loaded]
            vectors = {k: v.float().cpu() for k, v in reader(images.tensor, boxes).items()}
            labels = itertools.chain.from_iterable(classes for _, _, classes in loaded)
            counts = torch.tensor([len(classes) for _, _, classes in loaded])
            positions = torch.arange(start, start + len(batch)).repeat_interleave(counts)
            labels = torch.tensor(list(labels), dtype=torch.int64)
            found.append(Regions(vectors, labels, positions))
    return found


def with_boxes(dicts: Sequence[Mapping[str, Any]], where: str) -> list[Mapping[str, Any]]:
    """The records that have a box other than a crowd.

    Args:
        dicts: Detectron2 dataset dicts.
        where: names of the data sets, for the error message.

    Raises:
        UserError: there are none.
    """
    kept = [d for d in dicts if any(_counts(a) for a in d.get("annotations", ()))]
    if not kept:
        raise UserError(f"a probe needs labelled boxes: {where} has none")
    return kept


def load_region(
    record: Mapping[str, Any], input_format: str, augmentations: Sequence[T.Augmentation] = ()
) -> tuple[Tensor, Tensor, list[int]]:
    """An image (3, H, W) float32 in 0-255, its boxes (R, 4) XYXY in pixels, and their classes.

    Raises:
        UnreadableImage: the image cannot be read.
        UserError: its record gives it another size.
    """
    image = read_record(record, input_format)
    height, width = image.shape[:2]
    declared = record.get("width", width), record.get("height", height)
    if "crop" not in record and declared != (width, height):
        raise size_mismatch(record["file_name"], (width, height), declared)
    annotations = [a for a in record["annotations"] if _counts(a)]
    boxes = np.array(
        [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations],
        dtype=np.float32,
    ).reshape(-1, 4)
    if augmentations:
        inputs = T.AugInput(image, boxes=boxes)
        with random_state_of(0):  # even ResizeShortestEdge draws a number
            T.AugmentationList(augmentations)(inputs)
        image, boxes = inputs.image, inputs.boxes
    image = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1))).float()
    boxes = torch.as_tensor(np.asarray(boxes, dtype=np.float32))
    return image, boxes, [a["category_id"] for a in annotations]


def _counts(annotation: Mapping[str, Any]) -> bool:
    return not annotation.get("iscrowd", 0)


def _first(module: nn.Module, *names: str) -> nn.Module | None:
    return next((getattr(module, name) for name in names if hasattr(module, name)), None)


def _in_features(model: nn.Module, roi_heads: nn.Module, pooler: nn.Module) -> list[str]:
    """Names of the pooler's input maps: the detector's, else the model's, else the P-levels."""
    for owner in (roi_heads, model):
        names = getattr(owner, "in_features", ())
        if len(names) == len(pooler.level_poolers):
            return list(names)
    return [f"p{level}" for level in range(pooler.min_level, pooler.max_level + 1)]


def _pyramid_pooler(backbone: nn.Module) -> tuple[ROIPooler, list[str]]:
    """A pooler for a pyramid's maps without those of its top block, and the names of the maps."""
    shapes, names = backbone.output_shape(), pyramid_names(backbone)
    scales = [1 / shapes[name].stride for name in names]
    return ROIPooler(7, scales, sampling_ratio=0, pooler_type="ROIAlignV2"), names
