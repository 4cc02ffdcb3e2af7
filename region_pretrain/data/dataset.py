"""Images and their regions, turned into views by a method's own sampler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.catalog import FOLDER_PREFIX, get_records, label_by_folder
from region_pretrain.data.geometry import decode_reduction, render
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError
from region_pretrain.images import EncodedImage, UnreadableImage
from region_pretrain.regions import RegionStore
from region_pretrain.regions.recipes import RECIPES, GroundTruthRecipe

logger = logging.getLogger(__name__)

_TOGETHER = 64  # files in memory at once
_IN_A_ROW = 100
_REPLACED = "%s; the next image takes its place"


class File(NamedTuple):
    """A file of the data set.

    Attributes:
        encoded: not decoded yet.
        size: ``(width, height)`` in pixels.
        boxes: ``(N, 4)`` float32 XYXY, its regions; N is 0 without a store.
        label: its class, -1 where it has none.
    """

    encoded: EncodedImage
    size: tuple[int, int]
    boxes: np.ndarray
    label: int


class Sample(NamedTuple):
    """One image, and what to make of it.

    Attributes:
        image: ``(ceil(H / reduce), ceil(W / reduce), 3)`` uint8 RGB.
        reduce: 1, or the part of its size at which a large JPEG was decoded
            (:func:`~region_pretrain.data.geometry.decode_reduction`).
        views: of the view sampler.
        photometry: ``(P,)`` float32 of each view.
        label: the image's class, -1 where it has none.
    """

    image: np.ndarray
    reduce: int
    views: list[ViewSample]
    photometry: list[np.ndarray]
    label: int


class Drawn(NamedTuple):
    """A sample before its pixels: the image is ``offset`` places after the one it stands for."""

    encoded: EncodedImage
    size: tuple[int, int]
    views: list[ViewSample]
    photometry: list[np.ndarray]
    label: int
    offset: int
    rng: np.random.Generator

    @property
    def reduce(self) -> int:
        """1, or the part of its size at which the file may be decoded."""
        if not self.encoded.reducible:
            return 1
        return decode_reduction([view.geometry for view in self.views])


class PretrainDataset:
    """Images without labels; sample ``(seed, epoch, index)`` is the same everywhere, always.

    Args:
        names: registered data sets, or ``folder://DIR``; several are joined.
        views: the method's view sampler.
        regions: path of a region store, or ``None`` for methods that need none.
        recipe: the recipe that the store must have been made with, e.g. ``"grid-v1"``; a store of
            the recipe with changed fields (``"grid-v1+overlap=0.3"``) is accepted only if it is
            named in full. ``None`` accepts any.
        max_unreadable: share of the images that may be missing from the store (it holds no row
            for a file that could not be read).
        antialias: see :func:`~region_pretrain.data.geometry.render`.
        labels: give each image's class as ``ViewBatch.labels``: its record's ``category_id`` (as in
            ``imagenet_train_labeled`` and :mod:`region_pretrain.data.objects`), or where all data
            sets are folders, ``folder://DIR``, the rank of its folder in ``DIR``.
        allow_ground_truth: accept a store of annotated boxes, with which this is no longer
            pre-training without labels.

    A record may have a ``crop``, ``(x0, y0, x1, y1)`` in whole pixels: the image is this part of
    the file.

    Raises:
        UserError: no images, a store of other images or another recipe, one of annotated boxes,
            too many unreadable ones, or images without a class where ``labels`` wants one.
    """

    def __init__(
        self,
        names: str | Sequence[str],
        views: ViewSampler,
        regions: str | None = None,
        recipe: str | None = None,
        max_unreadable: float = 0.01,
        antialias: bool = True,
        labels: bool = False,
        allow_ground_truth: bool = False,
    ) -> None:
        records = get_records(names)
        if labels:
            _label(records, names)
        self.labels = labels
        self.views = views
        self.antialias = antialias
        self.store = None
        if regions is not None:
            self.store = RegionStore.open(regions)
            self._refuse_labels(regions, allow_ground_truth)
            records = self._match(records, names, regions, recipe, max_unreadable)
        # Only what a sample needs, packed so that workers do not copy a million dicts.
        self._records = DatasetFromList(
            [
                (r["file_name"], str(r["image_id"]), r.get("category_id", -1), r.get("crop"))
                for r in records
            ]
        )

    def _refuse_labels(self, regions: str, allow_ground_truth: bool) -> None:
        recipe = RECIPES.get(self.store.manifest["recipe"].split("+")[0])
        if not isinstance(recipe, GroundTruthRecipe):
            return
        if not allow_ground_truth:
            raise UserError(
                f"dataloader.train.dataset.regions={regions} holds annotated boxes "
                f"({recipe.name}): a run on them is not pre-training without labels. Make other "
                "regions with tools/make_regions.py, or, if it is meant, set "
                "dataloader.train.dataset.allow_ground_truth=True"
            )
        logger.warning("%s holds annotated boxes: this run uses labels", regions)

    def _match(
        self, records: list[dict], names, regions: str, recipe: str | None, max_unreadable: float
    ) -> list[dict]:
        made_with = self.store.manifest["recipe"]
        if recipe is not None and made_with != recipe:
            raise UserError(
                f"{regions} was made with recipe {made_with!r}, the config asks for {recipe!r}: "
                "make the regions again, or set dataloader.train.dataset.recipe"
            )
        missing = np.flatnonzero(self.store.rows([str(r["image_id"]) for r in records]) < 0)
        if len(missing) > max_unreadable * len(records):
            some = ", ".join(records[i]["file_name"] for i in missing[:3])
            raise UserError(
                f"{regions} has no regions for {len(missing)} of the {len(records)} images of "
                f"{names} (e.g. {some}): it was made for other images, or the files could not be "
                "read; make the regions of this data set with tools/make_regions.py, or raise "
                f"dataloader.train.dataset.max_unreadable (now {max_unreadable:g})"
            )
        if len(missing):
            listed = "\n  ".join(records[i]["file_name"] for i in missing[:20])
            logger.warning("left out %d images without a row:\n  %s", len(missing), listed)
            skip = set(missing.tolist())
            records = [r for i, r in enumerate(records) if i not in skip]
        rows = self.store.rows([str(r["image_id"]) for r in records])
        counts = self.store.counts(rows)
        logger.info(
            "%s: %d images, %.1f regions an image (%s); %d images without regions",
            names,
            len(records),
            counts.mean(),
            made_with,
            int((counts == 0).sum()),
        )
        return records

    def __len__(self) -> int:
        return len(self._records)

    def read(self, index: int) -> File:
        """A file of the data set, its image not yet decoded.

        Raises:
            UnreadableImage: the file is missing or its header damaged.
            UserError: its size is not that of the image that the regions were made for.
        """
        file_name, key, label, crop = self._records[index]
        image = EncodedImage.read(file_name, crop)
        size = image.size()
        boxes = np.zeros((0, 4), np.float32)
        if self.store is not None:
            made_for, boxes = self.store.entry(key)
            if made_for != size:
                raise UserError(
                    "{} is {}x{}, but its regions were made for an image of {}x{}: make the "
                    "regions again".format(file_name, *size, *made_for)
                )
        return File(image, size, boxes, label)

    def draw(self, seed: int, epoch: int, indices: Sequence[int], offset: int = 0) -> list[Drawn]:
        """Everything about some samples but their pixels.

        Args:
            seed, epoch, indices: which samples.
            offset: take the image so many places after the index, or the first readable one after.

        Raises:
            UserError: a hundred files in a row cannot be read, or the regions are another image's.
        """
        # Each step for all samples: what it touches stays in the processor's cache meanwhile.
        files = [self._first_readable(index, offset) for index in indices]
        # From 1: a generator of (seed, epoch, 0) would be that of the epoch's order.
        rngs = [np.random.default_rng([seed, epoch, 1 + index]) for index in indices]
        views = [
            self.views(*file.size, file.boxes, rng)
            for (file, _), rng in zip(files, rngs, strict=True)
        ]
        photometry = [
            [view.photometry.sample(rng) for view in some]
            for some, rng in zip(views, rngs, strict=True)
        ]
        return [
            Drawn(file.encoded, file.size, views[i], photometry[i], file.label, place, rngs[i])
            for i, (file, place) in enumerate(files)
        ]

    def _first_readable(self, index: int, offset: int) -> tuple[File, int]:
        """The file at ``index + offset`` or the first readable one after, and its offset."""
        for place in range(offset, min(len(self), _IN_A_ROW)):
            try:
                return self.read((index + place) % len(self)), place
            except UnreadableImage as error:
                logger.warning(_REPLACED, error)
        raise UserError(f"{_IN_A_ROW} images in a row could not be read, the last at index {index}")

    def _decode(self, seed: int, epoch: int, index: int, drawn: Drawn) -> Sample:
        while True:
            reduce = drawn.reduce
            try:
                image = drawn.encoded.decode(reduce)
                break
            except UnreadableImage as error:
                logger.warning(_REPLACED, error)
            (drawn,) = self.draw(seed, epoch, [index], drawn.offset + 1)
        views = self.views.complete(drawn.views, image, drawn.size, drawn.rng)
        return Sample(image, reduce, views, drawn.photometry, drawn.label)

    def sample(self, seed: int, epoch: int, index: int) -> Sample:
        """One image, its views and the photometric parameters of each.

        A file that fails in the middle of a run is replaced by the next one that does not.
        """
        return self._decode(seed, epoch, index, *self.draw(seed, epoch, [index]))

    def batch(self, seed: int, epoch: int, indices: Sequence[int]) -> ViewBatch:
        """Render the samples of one batch straight into its tensors."""
        canvases: list[np.ndarray] = []
        samples: list[list[ViewSample]] = []
        photometry: list[list[np.ndarray]] = []
        labels: list[int] = []
        # First what Python does for some images, then what the codecs do: one after the other for
        # each image, Python's code and data leave the processor's cache at every decode.
        for start in range(0, len(indices), _TOGETHER):
            some = indices[start : start + _TOGETHER]
            drawn = self.draw(seed, epoch, some)
            for i, index in enumerate(some):
                sample = self._decode(seed, epoch, index, drawn[i])
                if not canvases:
                    shapes = [(len(indices), *v.geometry.size, 3) for v in sample.views]
                    canvases = [np.empty(shape, np.uint8) for shape in shapes]
                for canvas, view in zip(canvases, sample.views, strict=True):
                    out = canvas[start + i]
                    render(sample.image, view.geometry, out, self.antialias, sample.reduce)
                samples.append(sample.views)
                photometry.append(sample.photometry)
                labels.append(sample.label)
        batch_views = []
        for v, canvas in enumerate(canvases):
            column = [views[v] for views in samples]
            batch_views.append(
                View(
                    images=torch.from_numpy(canvas).permute(0, 3, 1, 2),
                    boxes=torch.from_numpy(np.stack([s.boxes for s in column])),
                    valid=torch.from_numpy(np.stack([s.valid for s in column])),
                    region_ids=torch.from_numpy(np.stack([s.region_ids for s in column])),
                    affine=torch.from_numpy(np.stack([s.geometry.affine for s in column])),
                    photometry=torch.from_numpy(np.stack([p[v] for p in photometry])),
                )
            )
        return ViewBatch(
            batch_views,
            torch.as_tensor(indices, dtype=torch.int64),
            torch.as_tensor(labels, dtype=torch.int64) if self.labels else None,
        )


def _label(records: list[dict], names: str | Sequence[str]) -> None:
    names = [names] if isinstance(names, str) else list(names)
    if all(name.startswith(FOLDER_PREFIX) for name in names):
        classes = label_by_folder(records)
        logger.info("%d classes: %s ... %s", len(classes), classes[0], classes[-1])
    bare = [r for r in records if "category_id" not in r]
    if bare:
        raise UserError(
            f"dataloader.train.dataset.labels=True, but {len(bare)} of the {len(records)} images "
            f"have no class (e.g. {bare[0]['file_name']}): name {FOLDER_PREFIX}DIR with a folder a "
            "class, imagenet_train_labeled, or objects (region_pretrain.data.objects)"
        )
