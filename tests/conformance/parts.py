"""Small detectors and batches, and the formulas that the restatements of several methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from training_step import PRECISIONS

from region_pretrain.config import get_config
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY, PhotometryLayout

# Exact in float32, and different in each channel.
PIXELS = dict(pixel_mean=[100.25, 120.5, 130.75], pixel_std=[50.5, 60.25, 70.75])


def small_detector() -> Any:
    """Lazy config of a detector: ResNet-18 of 8 channels, FPN of 16, head of 16 and 32."""
    detector = get_config("common/models/mask_rcnn_fpn_small.py").model
    detector.backbone.bottom_up.stem.out_channels = 8
    detector.backbone.bottom_up.stages.channels = 8
    detector.backbone.out_channels = 16
    head = detector.roi_heads.box_head
    head.input_shape = ShapeSpec(channels=16, height=7, width=7)
    head.conv_dims, head.fc_dims = [16] * 4, [32]
    return detector


def small_trunk() -> nn.Module:
    """The trunk of :func:`small_detector`; its last map, ``res5``, has 64 channels."""
    return instantiate(small_detector().backbone.bottom_up)


def prepare(model: nn.Module, precision: str = "float64") -> nn.Module:
    """In training mode and at a precision, with noise on every parameter.

    After it the momentum copy differs from the online network, and no scale or bias is 0 or 1.
    """
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model.train().to(PRECISIONS[precision].dtype)


def view(
    images: int,
    size: int,
    seed: int,
    boxes: Tensor | None = None,
    ids: Tensor | None = None,
    valid: Tensor | None = None,
    precision: str = "float64",
) -> View:
    """Noise, of which every second image is solarised; ``boxes (B, K, 4)`` or none."""
    rng = np.random.default_rng(seed)
    photometry = np.tile(IDENTITY, (images, 1))
    photometry[::2, PhotometryLayout.SOLARIZE_FROM] = 0.5
    boxes = torch.zeros(images, 0, 4) if boxes is None else boxes
    slots = boxes.shape[:2]
    return View(
        images=torch.from_numpy(rng.integers(0, 256, (images, 3, size, size), dtype=np.uint8)),
        boxes=boxes.to(PRECISIONS[precision].dtype),
        valid=torch.ones(slots, dtype=torch.bool) if valid is None else valid,
        region_ids=torch.zeros(slots, dtype=torch.int64) if ids is None else ids,
        affine=torch.zeros(images, 2, 3),
        photometry=torch.from_numpy(photometry),
    )


def two_crops(images: int, steps: int) -> list[ViewBatch]:
    """Batches of two views of 64 pixels without regions."""
    return [
        ViewBatch([view(images, 64, 2 * s), view(images, 64, 2 * s + 1)], torch.arange(images))
        for s in range(steps)
    ]


def pixels(view: View, dtype: torch.dtype, channels: str = "RGB") -> Tensor:
    """Solarised and normalised images, ``(B, 3, H, W)``."""
    images = []
    for image, row in zip(view.images, view.photometry, strict=True):
        threshold = row[10].item()
        planes = []
        for c in range(3):
            x = image["RGB".index(channels[c])].float() / 255
            x = torch.where(x < threshold, x, 1 - x) * 255
            planes.append((x.to(dtype) - PIXELS["pixel_mean"][c]) / PIXELS["pixel_std"][c])
        images.append(torch.stack(planes))
    return torch.stack(images)


def unit(vectors: Tensor) -> Tensor:
    """``(N, D)``, each row divided by its length, in single precision or better."""
    vectors = vectors.float()
    return torch.stack([v / (v * v).sum().sqrt() for v in vectors])


def dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum()


def spread(vectors: Sequence[Tensor]) -> Tensor:
    """sqrt(D) times the mean over channels of the vectors' standard deviation."""
    channels = list(zip(*vectors, strict=True))
    deviations = []
    for values in channels:
        mean = sum(values) / len(values)
        deviations.append((sum((v - mean) ** 2 for v in values) / (len(values) - 1)) ** 0.5)
    return math.sqrt(len(channels)) * sum(deviations) / len(channels)


def cosine_schedule(start: float, progress: float) -> float:
    """The EMA momentum of BYOL and SoCo: from ``start`` to 1."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * progress)) / 2


def fpn_maps(fpn: nn.Module, images: Tensor) -> list[Tensor]:
    """P2 to P5 of a detector's FPN, for views of any size."""
    return top_down(fpn, fpn.bottom_up(images))


def top_down(fpn: nn.Module, bottom_up: dict[str, Tensor]) -> list[Tensor]:
    """P2 to P5 from the trunk's maps; a coarser map is resized to the nearest pixel."""
    maps, above = [], None
    for level in (5, 4, 3, 2):
        here = getattr(fpn, f"fpn_lateral{level}")(bottom_up[f"res{level}"])
        if above is not None:
            height, width = here.shape[-2:]
            rows = [y * above.shape[-2] // height for y in range(height)]
            columns = [x * above.shape[-1] // width for x in range(width)]
            here = here + above[:, :, rows][:, :, :, columns]
        above = here
        maps.insert(0, getattr(fpn, f"fpn_output{level}")(here))
    return maps


def enqueue(queues: list[nn.Module], keys: list[Tensor]) -> None:
    """Write keys to rings with the same content."""
    content, pointer = list(queues[0].keys), queues[0].pointer.item()
    for key in keys:
        content[pointer] = key
        pointer = (pointer + 1) % len(content)
    for queue in queues:
        queue.keys, queue.pointer = torch.stack(content), torch.tensor(pointer)
