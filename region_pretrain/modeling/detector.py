"""What a detector offers to pre-training, derived from its config or its modules."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from detectron2.config import CfgNode, instantiate
from detectron2.config import LazyCall as L
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.layers.batch_norm import LayerNorm
from detectron2.modeling.poolers import ROIPooler
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from region_pretrain.errors import UserError
from region_pretrain.modeling.dry_run import dry_run, example, output_of
from region_pretrain.modeling.norm_keys import norm_errors
from region_pretrain.modeling.preprocess import channel_order
from region_pretrain.modeling.pyramid import pyramid_names, trunk_name, trunk_of
from region_pretrain.modeling.region_head import SharedHeads, as_module, towers
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.overrides import target_of
from region_pretrain.yacs import lazy_detector

#: A module, or the lazy config of one.
Part = DictConfig | nn.Module


@dataclass(frozen=True)
class RegionHead:
    """What a detector applies to pooled regions.

    Attributes:
        part: maps ``(R, C, S, S)`` to vectors ``(R, channels)`` or to maps of as many channels.
        name: its name in the detector, e.g. ``roi_heads.box_head``.
        channels: number of output channels.
    """

    part: Part
    name: str
    channels: int


class Detector:
    """The modules of a detector that methods pre-train, and their shapes.

    Backbone, pooler and head are nodes of the detector's config, or its own modules if it is given
    as a module. Shapes are those of the built modules; a config's are built in a
    :func:`~region_pretrain.modeling.dry_run.dry_run`.

    Args:
        detector: ``model`` of a LazyConfig or the complete config, a yacs config, or a built
            detector: an R-CNN with FPN, C4 or DC5, a Cascade R-CNN, or a one-stage detector with
            the head of RetinaNet or FCOS.

    Raises:
        UserError: it is not a detector, or cannot be built.
    """

    def __init__(self, detector: DictConfig | CfgNode | nn.Module) -> None:
        if isinstance(detector, CfgNode):
            with norm_errors(detector):
                detector = dry_run(partial(lazy_detector, detector), "the detector")
        elif isinstance(detector, DictConfig) and "backbone" not in detector:
            detector = model_of(detector)
        if not all(_get(detector, key) is not None for key in ("backbone", "pixel_mean")):
            raise UserError("not a detector: it has no backbone or no pixel_mean")
        self.detector = detector
        self.is_built = isinstance(detector, nn.Module)
        self.backbone: Part = self._own(detector.backbone)
        self._backbone = _built(self.backbone)

    @property
    def pixels(self) -> dict[str, Any]:
        """``pixel_mean``, ``pixel_std`` and ``input_format``."""
        values: dict[str, Any] = {}
        for key in ("pixel_mean", "pixel_std"):
            value = _get(self.detector, key)
            values[key] = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
        known = _get(self.detector, "input_format")
        return values | {"input_format": channel_order(known, values["pixel_mean"])}

    @cached_property
    def trunk(self) -> Part:
        """The trunk under its own name: a :class:`Trunk`, or the backbone if it is one."""
        name = trunk_name(self._backbone)
        if not name:
            return self.backbone
        if self.is_built:
            return _trunk_of(self.backbone)
        if name in self.backbone:
            return L(Trunk)(**{name: self.backbone[name]})
        return L(_trunk_of)(backbone=self.backbone)

    @property
    def has_layer_norms(self) -> bool:
        """Whether the trunk has layer norms and no batch norms: a transformer or a ConvNeXt."""
        modules = list(trunk_of(self._backbone).modules())
        batch_norms = (nn.modules.batchnorm._BatchNorm, FrozenBatchNorm2d)
        layer_norms = (nn.LayerNorm, LayerNorm)
        return any(isinstance(m, layer_norms) for m in modules) and not any(
            isinstance(m, batch_norms) for m in modules
        )

    @property
    def trunk_map(self) -> tuple[str, int]:
        """Name and channels of the trunk's coarsest map, e.g. ``("res5", 2048)``."""
        shapes = self._trunk_shapes
        name = max(shapes, key=lambda n: shapes[n].stride)
        return name, shapes[name].channels

    @property
    def trunk_stride(self) -> int:
        """Stride of the trunk's coarsest map in pixels."""
        return self._trunk_shapes[self.trunk_map[0]].stride

    @property
    def _trunk_shapes(self) -> dict[str, ShapeSpec]:
        return trunk_of(self._backbone).output_shape()

    @property
    def levels(self) -> dict[str, ShapeSpec]:
        """Maps of the feature pyramid, finest first, without those of its top block; else {}."""
        if not trunk_name(self._backbone):
            return {}
        shapes = self._backbone.output_shape()
        return {name: shapes[name] for name in pyramid_names(self._backbone)}

    def image_networks(self) -> tuple[dict[str, Any], int]:
        """What an image-level method trains.

        Returns:
            The arguments ``backbone``, ``feature`` (the trunk's coarsest map) and, of a C4
            detector, ``res5``; and the channels of what they compute.
        """
        feature, channels = self.trunk_map
        networks = {"backbone": self.trunk, "feature": feature}
        if self.res5 is None:
            return networks, channels
        return networks | {"res5": self.res5}, self.res5_channels

    @cached_property
    def region_maps(self) -> list[str]:
        """Names of the maps that regions are pooled from, finest first.

        Those of the detector's box head; for a one-stage detector those of its pyramid.

        Raises:
            UserError: it has neither.
        """
        heads = _get(self.detector, "roi_heads")
        names = _get(heads, "box_in_features") or _get(heads, "in_features") or self.levels
        if not names:
            raise UserError(
                f"the pyramid of {type(self._backbone).__name__} is neither an FPN nor a "
                "SimpleFeaturePyramid of Detectron2, and no box head names the maps that regions "
                "are pooled from: use a method that trains the trunk only"
            )
        return list(names)

    @cached_property
    def strides(self) -> list[int]:
        """Strides of :attr:`region_maps` in pixels."""
        shapes = self._backbone.output_shape()
        return [shapes[name].stride for name in self.region_maps]

    @cached_property
    def pooler(self) -> Part | None:
        """The detector's box pooler; for a one-stage detector a new one of 7 x 7."""
        heads = _get(self.detector, "roi_heads")
        found = _get(heads, "box_pooler") or _get(heads, "pooler")
        if found is not None or not self.levels:
            return None if found is None else self._own(found)
        node = L(ROIPooler)(
            output_size=7,
            scales=[1.0 / stride for stride in self.strides],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        )
        return instantiate(node) if self.is_built else node

    @cached_property
    def pooled_shape(self) -> tuple[int, int, int]:
        """``(C, S, S)`` of a pooled region."""
        channels = self._backbone.output_shape()[self.region_maps[0]].channels
        return (channels, *_built(self.pooler).output_size)

    @cached_property
    def res5(self) -> Part | None:
        """The last stage of a C4 detector."""
        found = _get(_get(self.detector, "roi_heads"), "res5")
        return None if found is None else self._own(found)

    @property
    def res5_channels(self) -> int:
        """Output channels of :attr:`res5`."""
        return self.channels(self.res5)

    @cached_property
    def head(self) -> RegionHead | None:
        """What the detector applies to pooled regions; None if it has no such head.

        The box head of an R-CNN; one box head for all stages of a Cascade R-CNN; ``res5`` of a C4
        detector; both towers of a one-stage detector.

        Raises:
            UserError: a one-stage detector's towers have a batch norm per level.
        """
        heads = _get(self.detector, "roi_heads")
        if self.res5 is not None:
            return RegionHead(self._own(self.res5), "roi_heads.res5", self.res5_channels)
        found = _get(heads, "box_heads") or _get(heads, "box_head")
        if isinstance(found, ListConfig | nn.ModuleList):
            first, count = self._own(found[0]), len(found)
            shared = (
                SharedHeads(first, count)
                if self.is_built
                else L(SharedHeads)(head=first, count=count)
            )
            return RegionHead(shared, "roi_heads.box_head", self.channels(shared))
        if found is not None:
            return RegionHead(self._own(found), "roi_heads.box_head", self.channels(found))
        dense = _get(self.detector, "head")
        if dense is None or not all(
            hasattr(_built(dense), name) for name in ("cls_subnet", "bbox_subnet")
        ):
            return None
        part = towers(dense) if self.is_built else L(towers)(head=self._own(dense))
        return RegionHead(part, "head", self.channels(part))

    def level_scales(self, size: int) -> list[float]:
        """The largest region scale of each map in pixels of a view of the given size.

        12 feature pixels, which is 48, 96 and 192 for strides of 4, 8 and 16 (as in the released
        code of arXiv 2106.02637), and the complete view for the last map.
        """
        return [min(12 * stride, size) for stride in self.strides[:-1]] + [size]

    def refer(self, key: str, value: Any) -> Any:
        """An interpolation of a key of the pre-training config; ``value`` for a built detector."""
        return value if self.is_built else f"${{{key}}}"

    def finish(self, model: DictConfig) -> DictConfig | nn.Module:
        """A lazy pre-training model, built if the detector is."""
        return instantiate(model) if self.is_built else model

    def _own(self, node: Part) -> Part:
        """A node without interpolations, which may refer to other parts of the detector."""
        if isinstance(node, nn.Module):
            return node
        node = copy.deepcopy(node)
        OmegaConf.resolve(node)
        return node

    def channels(self, part: Part) -> int:
        """Number of channels that a module computes from pooled regions."""
        shape = self.pooled_shape

        def compute() -> int:
            head = as_module(part if isinstance(part, nn.Module) else instantiate(part))
            return output_of(head, example(2, *shape)).shape[1]

        with norm_errors(part):
            return dry_run(compute, _kind(part))


def model_of(cfg: DictConfig) -> DictConfig:
    """``model`` of a detection config, with the input format.

    Detectron2's FCOS, which does not know it, has the format of the mapper, or else of its mean.

    Raises:
        UserError: see :func:`check_input_format`.
    """
    check_input_format(cfg)
    model = cfg.get("model", DictConfig({}))
    if "backbone" in model and model.get("input_format") is None:
        model = copy.deepcopy(model)  # the detector itself may not take it
        model.input_format = channel_order(_image_format(cfg, "train"), model.get("pixel_mean"))
    return model


def check_input_format(cfg: DictConfig) -> None:
    """Check that the mappers of a detection config read the channel order of its model.

    Pre-training reads images in ``model.input_format``, fine-tuning in ``image_format`` of the
    mapper.

    Raises:
        UserError: one is RGB, the other BGR; or see :func:`refuse_input_format`.
    """
    refuse_input_format(cfg.get("model"))
    model = OmegaConf.select(cfg, "model.input_format")
    for split in ("train", "test"):
        mapper = _image_format(cfg, split)
        if {model, mapper} == {"RGB", "BGR"}:
            raise UserError(
                f"model.input_format={model}, but dataloader.{split}.mapper.image_format={mapper}: "
                "set both to the channel order of model.pixel_mean and of the initial weights"
            )


def refuse_input_format(model: Any) -> None:
    """Refuse the ``input_format`` of a lazy detector that cannot be built with it.

    Raises:
        UserError: it is given, and the detector's class does not take it, as Detectron2's FCOS.
    """
    if not isinstance(model, DictConfig) or "input_format" not in model:
        return
    target = target_of(model)
    if not isinstance(target, type):
        return
    arguments = inspect.signature(target).parameters.values()
    if not any(a.name == "input_format" or a.kind == a.VAR_KEYWORD for a in arguments):
        raise UserError(
            f"model.input_format={model.input_format}: {target.__name__} has no argument of this "
            "name: leave it out, and set image_format of dataloader.train.mapper and "
            "dataloader.test.mapper"
        )


def _image_format(cfg: DictConfig, split: str) -> str | None:
    node: Any = cfg
    for key in ("dataloader", split, "mapper", "image_format"):
        node = node.get(key) if isinstance(node, DictConfig) else None
    return node


def _trunk_of(backbone: nn.Module) -> Trunk:
    name = trunk_name(backbone)
    return Trunk(**{name: getattr(backbone, name)})


def _get(node: Any, key: str) -> Any:
    """``node.key``, or None."""
    if isinstance(node, Mapping | DictConfig):
        return node.get(key)
    return getattr(node, key, None)


def _built(part: Part) -> Any:
    if isinstance(part, nn.Module):
        return part
    with norm_errors(part):
        return dry_run(partial(instantiate, part), _kind(part))


def _kind(part: Part) -> str:
    """The name of a module's class."""
    target = part.get("_target_") if isinstance(part, DictConfig) else type(part)
    return str(getattr(target, "__name__", target)).rpartition(".")[2]
