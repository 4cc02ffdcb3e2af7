"""The pre-training data set: images and regions, turned into views by a method's view sampler."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from detectron2.data import DatasetFromList

from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.catalog import get_records, label_by_folder
from region_pretrain.data.contents import Contents
from region_pretrain.data.folder import FOLDER_PREFIX
from region_pretrain.data.geometry import decode_reduction, render
from region_pretrain.data.views import ViewSample, ViewSampler, check_same_layout, checked_views
from region_pretrain.errors import UserError
from region_pretrain.images import EncodedImage, UnreadableImage, readings_of
from region_pretrain.regions import RegionStore
from region_pretrain.regions.images import changed_files
from region_pretrain.regions.recipes import RECIPES, GroundTruthRecipe
from region_pretrain.regions.store import UnknownImage

logger = logging.getLogger(__name__)

_FILES_IN_MEMORY = 64
_MAX_UNREADABLE_IN_A_ROW = 100


class File(NamedTuple):
    """An image of the data set before it is decoded.

    Attributes:
        encoded: its bytes.
        size: ``(width, height)`` in pixels.
        boxes: ``(N, 4)`` float32 XYXY, its regions; N is 0 without a store.
        label: its class, or -1.
    """

    encoded: EncodedImage
    size: tuple[int, int]
    boxes: np.ndarray
    label: int


class Drawn(NamedTuple):
    """The random choices of a sample, before its image is decoded.

    Attributes:
        file: the image's file.
        views: the view sampler's choice.
        photometry: ``(P,)`` float32 parameters per view.
        offset: position of the file after the sample's index; 0 unless files are unreadable.
        rng: the sample's generator.
    """

    file: File
    views: list[ViewSample]
    photometry: list[np.ndarray]
    offset: int
    rng: np.random.Generator

    @property
    def reduce(self) -> int:
        """Factor by which the image is downscaled in decoding; 1 unless it is a large JPEG."""
        return self.file.encoded.reduction(decode_reduction([v.geometry for v in self.views]))


class Sample(NamedTuple):
    """A decoded image and its views.

    Attributes:
        image: ``(ceil(H / reduce), ceil(W / reduce), 3)`` uint8 RGB.
        reduce: see :attr:`Drawn.reduce`.
        views: the views, with the regions that depend on the pixels.
        photometry: ``(P,)`` float32 parameters per view.
        label: the image's class, or -1.
    """

    image: np.ndarray
    reduce: int
    views: list[ViewSample]
    photometry: list[np.ndarray]
    label: int


class PretrainDataset:
    """Unlabelled images; a sample is a function of ``(seed, epoch, index)`` alone.

    Args:
        names: one or several data sets, registered or named by path, e.g. ``folder://DIR``.
        views: the method's view sampler.
        regions: path of a region store, or ``None`` for methods without regions.
        recipe: the id of the recipe that the store must be made with, e.g. ``"grid-v1"``, or
            ``"grid-v1+overlap=0.3"`` if fields were changed. ``None`` accepts any.
        max_unreadable: largest fraction of the images that may be missing from the store, which has
            no row for an unreadable file.
        antialias: see :func:`~region_pretrain.data.geometry.render`.
        labels: return each image's class in ``ViewBatch.labels``: the ``category_id`` of its record
            (as in ``imagenet_train_labeled``) or, if all data sets are folders (``folder://DIR``),
            the index of its first subfolder.
        allow_ground_truth: accept a store of annotated boxes; with it, this is no longer
            pre-training without labels.
        allow_changed_files: accept a store of other files, such as the same images encoded again.

    A record may have a ``crop``, ``(x0, y0, x1, y1)`` in whole pixels: the image is this crop of
    the file; and a ``reading``, see :class:`~region_pretrain.images.reading.Reading`.

    Raises:
        UserError: no images; no store although the views need one; a store of other images, of
            another recipe or of annotated boxes; too many images missing from the store; or
            ``labels`` for images without a class.
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
        allow_changed_files: bool = False,
    ) -> None:
        if regions is None and views.needs_regions:
            raise UserError(
                "dataloader.train.dataset.regions is empty, but these views need regions: make "
                "them with region-pretrain regions and name the store"
            )
        records = get_records(names, annotations=False, unique=regions is not None)
        if labels:
            _label(records, names)
        self._last_error: UnreadableImage | None = None
        self.labels = labels
        self.views = views
        self.antialias = antialias
        self.store = None
        if regions is not None:
            self.store = RegionStore.open(regions)
            self._check_ground_truth(regions, allow_ground_truth)
            records = self._with_regions(records, names, regions, recipe, max_unreadable)
            self._check_files(records, names, regions, allow_changed_files)
        # Only what a sample needs, serialised so that workers do not copy a million dicts.
        self._records = DatasetFromList(
            [
                (
                    r["file_name"],
                    str(r["image_id"]),
                    r.get("category_id", -1),
                    r.get("crop"),
                    r.get("reading"),
                )
                for r in records
            ]
        )

    def _check_ground_truth(self, regions: str, allow_ground_truth: bool) -> None:
        recipe = RECIPES.get(self.store.manifest["recipe"].split("+")[0])
        if not isinstance(recipe, GroundTruthRecipe):
            return
        if not allow_ground_truth:
            raise UserError(
                f"dataloader.train.dataset.regions={regions} contains annotated boxes "
                f"({recipe.name}), so this would not be pre-training without labels: make other "
                "regions with region-pretrain regions or, if intended, set "
                "dataloader.train.dataset.allow_ground_truth=True"
            )
        logger.warning("%s contains annotated boxes: this run uses labels", regions)

    def _check_files(self, records: list[dict], names, regions: str, allowed: bool) -> None:
        """Refuse regions of other images with the same keys, such as frames of another video."""
        changed, compared = changed_files(self.store, records)
        if not changed:
            return
        differ = f"{len(changed)} of {compared} compared files differ in size, e.g. {changed[0]}"
        if 2 * len(changed) > compared and not allowed:
            raise UserError(
                f"{regions} was made from other files than those of {names}: {differ}; make the "
                "regions of this data set with region-pretrain regions or, if the same images were "
                "only encoded again, set +dataloader.train.dataset.allow_changed_files=True"
            )
        logger.warning("Files of %s have changed since %s was made: %s", names, regions, differ)

    def _with_regions(
        self, records: list[dict], names, regions: str, recipe: str | None, max_unreadable: float
    ) -> list[dict]:
        """The records that have a row in the store."""
        made_with = self.store.manifest["recipe"]
        if recipe is not None and made_with != recipe:
            raise UserError(
                f"{regions} was made with recipe {made_with!r}, but the config requires "
                f"{recipe!r}: make the regions again, or set "
                f"dataloader.train.dataset.recipe={made_with}"
            )
        reading, found_with = readings_of(records), self.store.manifest.get("reading")
        if found_with not in (None, reading):
            logger.warning(
                "The regions of %s were found in images read with %s, but this run reads them "
                "with %s",
                regions,
                found_with or "no options",
                reading or "no options",
            )
        missing = np.flatnonzero(self.store.rows([str(r["image_id"]) for r in records]) < 0)
        # Region search has accepted these, and its log named them.
        unreadable = self.store.manifest.get("summary", {}).get("unreadable", 0)
        if len(missing) > max(max_unreadable * len(records), unreadable):
            some = ", ".join(records[i]["file_name"] for i in missing[:3])
            raise UserError(
                f"{regions} has no regions for {len(missing)} of the {len(records)} images of "
                f"{names} (e.g. {some}): it was made for other images, or the files were "
                "unreadable; make the regions of this data set with region-pretrain regions, or "
                f"raise dataloader.train.dataset.max_unreadable (now {max_unreadable:g})"
            )
        if len(missing):
            listed = "\n  ".join(records[i]["file_name"] for i in missing[:20])
            logger.warning(
                "Skipping %d images that are not in the store:\n  %s", len(missing), listed
            )
            skip = set(missing.tolist())
            records = [r for i, r in enumerate(records) if i not in skip]
        counts = self.store.counts(self.store.rows([str(r["image_id"]) for r in records]))
        logger.info(
            "%s: %d images, %.1f regions per image (%s); %d images without regions",
            names,
            len(records),
            counts.mean(),
            made_with,
            int((counts == 0).sum()),
        )
        return records

    def __len__(self) -> int:
        return len(self._records)

    def records(self) -> list[dict]:
        """The images as Detectron2 dicts, in the order of their indices."""
        names = ("file_name", "image_id", "category_id", "crop", "reading")
        return [
            {name: value for name, value in zip(names, r, strict=True) if value is not None}
            for r in self._records
        ]

    def contents(self) -> Contents:
        """The images and their regions, in the order of their indices."""

        def image(index: int) -> tuple[str, Any]:
            file_name, key, *others = self._records[index]
            known = not self.labels and others[1:] == [None, None]
            return file_name, None if known and key in file_name else (key, *others)

        regions = self.store.manifest["sha256"] if self.store is not None else ""
        return Contents(len(self), image, regions)

    def read(self, index: int) -> File:
        """Read a file of the data set without decoding it.

        Raises:
            UnreadableImage: the file is missing or its header is damaged, or the store lacks it.
            UserError: its size is not the size that its regions were made for.
        """
        file_name, key, label, crop, reading = self._records[index]
        image = EncodedImage.read(file_name, crop, reading)
        size = image.size()
        boxes = np.zeros((0, 4), np.float32)
        if self.store is not None:
            try:
                made_for, boxes = self.store.entry(key)
            except UnknownImage as error:  # it was unreadable when the regions were renewed
                raise UnreadableImage(str(error)) from error
            if made_for != size:
                raise UserError(
                    "{} is {}x{}, but its regions were made for {}x{}: make the regions "
                    "again".format(image.name, *size, *made_for)
                )
        return File(image, size, boxes, label)

    def draw(self, seed: int, epoch: int, indices: Sequence[int], offset: int = 0) -> list[Drawn]:
        """Draw the views and photometric parameters of some samples; see :class:`Drawn`.

        Args:
            seed, epoch, indices: which samples.
            offset: use the first readable image from this many places after the index.

        Raises:
            UserError: 100 files in a row are unreadable, or regions are those of another image.
        """
        # One step for all samples after the other keeps the step's code and data in the CPU cache.
        files = [self._first_readable(index, offset) for index in indices]
        # From 1, because the generator of (seed, epoch, 0) is the one of the epoch's order.
        rngs = [np.random.default_rng([seed, epoch, 1 + index]) for index in indices]
        views = [
            checked_views(self.views, "__call__", self.views(*file.size, file.boxes, rng))
            for (file, _), rng in zip(files, rngs, strict=True)
        ]
        photometry = [
            [view.photometry.sample(rng) for view in some]
            for some, rng in zip(views, rngs, strict=True)
        ]
        return [
            Drawn(file, views[i], photometry[i], place, rngs[i])
            for i, (file, place) in enumerate(files)
        ]

    def _first_readable(self, index: int, offset: int) -> tuple[File, int]:
        """The first readable file from ``index + offset`` on, and its offset."""
        places = range(offset, min(len(self), _MAX_UNREADABLE_IN_A_ROW))
        for place in places:
            try:
                return self.read((index + place) % len(self)), place
            except UnreadableImage as error:
                self._replace(error)
        raise UserError(
            f"{places.stop} images in a row are unreadable, starting at index {index}; the last "
            f"one: {self._last_error}"
        )

    def _replace(self, error: UnreadableImage) -> None:
        logger.warning("%s; replaced by the next image", error)
        self._last_error = error

    def _decode(self, seed: int, epoch: int, index: int, drawn: Drawn) -> Sample:
        while True:
            try:
                image = drawn.file.encoded.decode(drawn.reduce)
                break
            except UnreadableImage as error:
                self._replace(error)
            (drawn,) = self.draw(seed, epoch, [index], drawn.offset + 1)
        views = self.views.complete(drawn.views, image, drawn.file.size, drawn.rng)
        checked_views(self.views, "complete", views)
        return Sample(image, drawn.reduce, views, drawn.photometry, drawn.file.label)

    def sample(self, seed: int, epoch: int, index: int) -> Sample:
        """One image, its views and their photometric parameters.

        A file that cannot be decoded is replaced by the next one that can.
        """
        return self._decode(seed, epoch, index, *self.draw(seed, epoch, [index]))

    def batch(self, seed: int, epoch: int, indices: Sequence[int]) -> ViewBatch:
        """Render the samples of a batch directly into its tensors."""
        canvases: list[np.ndarray] = []
        samples: list[list[ViewSample]] = []
        photometry: list[list[np.ndarray]] = []
        labels: list[int] = []
        # Draw for many images first, then decode: alternating per image, each decode would evict
        # Python's code and data from the CPU cache.
        for start in range(0, len(indices), _FILES_IN_MEMORY):
            some = indices[start : start + _FILES_IN_MEMORY]
            drawn = self.draw(seed, epoch, some)
            for i, index in enumerate(some):
                sample = self._decode(seed, epoch, index, drawn[i])
                if not canvases:
                    shapes = [(len(indices), *v.geometry.size, 3) for v in sample.views]
                    canvases = [np.empty(shape, np.uint8) for shape in shapes]
                samples.append(sample.views)
                check_same_layout(samples[0], sample.views)
                for canvas, view in zip(canvases, sample.views, strict=True):
                    out = canvas[start + i]
                    render(sample.image, view.geometry, out, self.antialias, sample.reduce)
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
    """Make sure that every record has a class; see ``labels`` of :class:`PretrainDataset`."""
    names = [names] if isinstance(names, str) else list(names)
    if all(name.startswith(FOLDER_PREFIX) for name in names):
        classes = label_by_folder(records)
        logger.info("%d classes: %s ... %s", len(classes), classes[0], classes[-1])
    bare = [r for r in records if "category_id" not in r]
    if bare:
        raise UserError(
            f"dataloader.train.dataset.labels=True, but {len(bare)} of the {len(records)} images "
            f"have no class (e.g. {bare[0]['file_name']}): use {FOLDER_PREFIX}DIR with one folder "
            "per class, or a data set whose records have a category_id"
        )
