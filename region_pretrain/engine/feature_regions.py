"""Regions from the features of a network in training."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
import torch
from torch import nn

from region_pretrain.convert.digest import digest_of
from region_pretrain.convert.facts import facts_of
from region_pretrain.engine.build import build_model, resolve_device
from region_pretrain.engine.checkpoint_file import DamagedCheckpoint, read_run_checkpoint
from region_pretrain.engine.image_boxes import ImageBoxes, load_model_config
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError, describe
from region_pretrain.images import read_record
from region_pretrain.modeling.meta_arch import PretrainingModel, renew_momentum_copies
from region_pretrain.modeling.momentum import MomentumCopy
from region_pretrain.regions.cluster_boxes import cluster_boxes
from region_pretrain.regions.elsewhere import FeaturesRecipe
from region_pretrain.regions.elsewhere.matching import Given
from region_pretrain.regions.generate import PIXELS

_MULTIPLE = 32  # of a network's coarsest stride


class _Image(NamedTuple):
    """An image and the network's input.

    Attributes:
        pixels: ``(H, W, 3)`` uint8 RGB.
        resized: ``(h, w, 3)`` uint8 RGB; sides are multiples of 32.
    """

    pixels: np.ndarray
    resized: np.ndarray


class FeatureBoxes(ImageBoxes):
    """Clusters the features of images, in batches.

    The boxes of an image do not depend on the other images of its batch, except through rounding.

    Args:
        model: a detector or a pre-training model on its device, in eval mode; see
            :func:`feature_network`.
        recipe: which map is clustered, and how.
        batch_size: images per batch.
        keep_pixels: also add the images' pixels to their records, so that
            :func:`~region_pretrain.regions.generate.make_regions` with one worker does not decode
            them again.

    Attributes:
        recipe: the recipe; its ``source`` is a digest of the network's weights and input format.

    Raises:
        UserError: the model has no backbone, or ``batch_size`` is less than 1.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: FeaturesRecipe,
        batch_size: int = 8,
        keep_pixels: bool = False,
    ) -> None:
        super().__init__(batch_size)
        self._network = feature_network(model)
        facts = facts_of(model)
        if facts.pixel_mean is None or facts.input_format is None:
            raise UserError(f"{type(model).__name__} has no pixel_mean or no input_format")
        self._device = next(self._network.parameters()).device
        mean, std = (
            torch.tensor(values, device=self._device).view(3, 1, 1)
            for values in (facts.pixel_mean, facts.pixel_std)
        )
        self._mean, self._std, self._flip = mean, std, facts.input_format == "BGR"
        self._map = _map_name(model, self._network, recipe.stride)
        self._keep_pixels = keep_pixels
        state = {name: tensor.cpu() for name, tensor in self._network.state_dict().items()}
        pixels = [facts.input_format, *facts.pixel_mean, *facts.pixel_std]
        digest = digest_of({"network": state, "pixels": pixels})[:16]
        self.recipe = dataclasses.replace(recipe, source=digest)

    def read(self, record: dict) -> _Image:
        pixels = read_record(record)
        return _Image(pixels, resize_to_area(pixels, self.recipe.side))

    def find(self, inputs: Sequence[_Image]) -> list[Given]:
        by_size: dict[tuple[int, int], list[int]] = {}
        for i, image in enumerate(inputs):
            height, width = image.resized.shape[:2]
            by_size.setdefault((width, height), []).append(i)
        found: dict[int, Given] = {}
        for size, members in by_size.items():
            images = torch.from_numpy(np.stack([inputs[i].resized for i in members]))
            images = images.to(self._device).permute(0, 3, 1, 2).float()
            images = (images.flip(1) if self._flip else images).sub(self._mean).div(self._std)
            maps = self._network(images)[self._map]
            for i, boxes in zip(
                members, cluster_boxes(maps, self.recipe.clusters, size), strict=True
            ):
                height, width = inputs[i].pixels.shape[:2]
                scale = np.array((width / size[0], height / size[1]) * 2)
                boxes = np.rint(boxes * scale).astype(np.float32)
                found[i] = Given(boxes, None, (width, height), "the network's features")
        return [found[i] for i in range(len(inputs))]

    def result(self, record: dict, given: _Image, boxes: Given) -> dict:
        record = super().result(record, given, boxes)
        return {**record, PIXELS: given.pixels} if self._keep_pixels else record


def resize_to_area(pixels: np.ndarray, side: int) -> np.ndarray:
    """Downscale an image to an area of about ``side * side``, and round its sides.

    Rounding to multiples of 32 avoids padding, and lets many images share a batch.

    Args:
        pixels: ``(H, W, 3)`` uint8.

    Returns:
        ``(h, w, 3)`` uint8.
    """
    height, width = pixels.shape[:2]
    scale = min(1.0, side / (width * height) ** 0.5)
    size = [max(1, round(n * scale / _MULTIPLE)) * _MULTIPLE for n in (width, height)]
    return cv2.resize(pixels, size, interpolation=cv2.INTER_AREA)


def feature_network(model: nn.Module) -> nn.Module:
    """The backbone whose features are clustered: the momentum network's, otherwise the model's.

    Raises:
        UserError: the model has neither.
    """
    copies = [m for m in model.modules() if isinstance(m, MomentumCopy) and "backbone" in m]
    network = copies[0]["backbone"] if copies else getattr(model, "backbone", None)
    if network is None or not hasattr(network, "output_shape"):
        raise UserError(f"{type(model).__name__} has no backbone whose features have boxes")
    return network


def _map_name(model: nn.Module, network: nn.Module, stride: int) -> str:
    """The map to cluster, among those that a pre-training method trains."""
    strides = {name: shape.stride for name, shape in network.output_shape().items()}
    if isinstance(model, PretrainingModel):
        read = getattr(model, "in_features", None) or [getattr(model, "feature", None)]
        strides = {name: s for name, s in strides.items() if name in read} or strides
    fine = [name for name in strides if strides[name] <= stride]
    return max(fine, key=strides.get) if fine else min(strides, key=strides.get)


def load_trained(config: str, weights: str, device: str | None = None) -> nn.Module:
    """Load a pre-training model or a detector, with its momentum network if there is one.

    Args:
        config: see :func:`~region_pretrain.engine.image_boxes.load_model_config`.
        weights: its checkpoint.
        device: ``cuda``, ``mps`` or ``cpu``; None: the config's.

    Returns:
        The model in eval mode.

    Raises:
        UserError: the config or the weights cannot be loaded, or do not belong together.
    """
    cfg = load_model_config(config)
    model = build_model(cfg, resolve_device(device or cfg.train.device)).eval()
    incomplete = load_pretrained(model, weights).incomplete
    if random := [name for name in incomplete if name.startswith("backbone")]:
        raise UserError(f"{weights} has no weights for {', '.join(random)} of {config}")
    if isinstance(model, PretrainingModel):
        renew_momentum_copies(model)  # a detector's weights have none
        try:
            others = read_run_checkpoint(weights)["pretraining"]
        except DamagedCheckpoint:  # weights in another format
            return model
        try:
            unexpected = model.load_state_dict(others, strict=False).unexpected_keys
        except RuntimeError as error:
            raise UserError(f"{weights} is not of {config}: {describe(error)}") from error
        if unexpected:
            raise UserError(f"{weights} is not of {config}, which has no {unexpected[0]}")
    return model
