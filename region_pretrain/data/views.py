"""View samplers: the base class, and the views that a sampler returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from region_pretrain.contract import Contract
from region_pretrain.data.batch import ViewBatch
from region_pretrain.data.geometry import ViewGeometry
from region_pretrain.data.photometry import CutOut, Photometry
from region_pretrain.errors import UserError


@dataclass
class ViewSample:
    """One view of one image, before it is rendered.

    Attributes:
        geometry: the view's crop, size and flip.
        photometry: the distribution of the view's photometric augmentation.
        boxes: ``(K, 4)`` float32 XYXY in view pixels.
        region_ids: ``(K,)`` int64; equal ids in several views are the same region.
        valid: ``(K,)`` bool; false where the slot contains no region.
    """

    geometry: ViewGeometry
    photometry: Photometry | CutOut
    boxes: np.ndarray
    region_ids: np.ndarray
    valid: np.ndarray


class ViewSampler(Contract, ABC):
    """Base class of a method's view sampler, which chooses the views of each image.

    The number of views, their sizes and ``K``, the number of region slots of each, are the same for
    all images. All randomness comes from the generator that is passed in, so a sample is the same
    with any number of loader workers and after a resume.

    Attributes:
        needs_regions: refuse a data set without a region store, as nothing would be learnt.
    """

    needs_regions = False

    @abstractmethod
    def __call__(
        self, width: int, height: int, boxes: np.ndarray, rng: np.random.Generator
    ) -> list[ViewSample]:
        """Choose the views of an image.

        Args:
            width, height: size of the image in pixels.
            boxes: ``(N, 4)`` float32 XYXY, its regions in pixels of the image; N may be 0.
            rng: the only source of randomness.
        """

    def complete(
        self,
        views: list[ViewSample],
        image: np.ndarray,
        size: tuple[int, int],
        rng: np.random.Generator,
    ) -> list[ViewSample]:
        """Add regions that depend on the pixels, once the image has been decoded.

        Args:
            views: the views that :meth:`__call__` returned.
            image: ``(h, w, 3)`` uint8 RGB, possibly decoded at a reduced size.
            size: ``(width, height)`` of the original image in pixels.
            rng: the sample's generator.

        Returns:
            The views, with the same geometries.
        """
        return views

    def pictures(self, batch: ViewBatch) -> list[list[np.ndarray]] | None:
        """Draw what the network receives if it is not the views themselves (montages, points).

        Returns:
            For each image of the batch a row of ``(H, W, 3)`` uint8 RGB pictures; None if the
            network receives the views.
        """
        return None


def checked_views(sampler: ViewSampler, hook: str, views: object) -> list[ViewSample]:
    """What a hook of a view sampler returns.

    Raises:
        UserError: it is not a list of views.
    """
    found = f"a {type(views).__name__}"
    if isinstance(views, list | tuple):
        others = [type(view).__name__ for view in views if not isinstance(view, ViewSample)]
        if views and not others:
            return views
        found = f"{found} with a {others[0]}" if others else "an empty list"
    raise UserError(
        f"{type(sampler).__qualname__}.{hook} of the view sampler returns {found}: return a list "
        "of ViewSample, one for each view"
    )


def check_same_layout(first: list[ViewSample], views: list[ViewSample]) -> None:
    """Check that two images have the same views, so that they can be in one batch.

    Raises:
        UserError: their numbers, sizes or region slots differ.
    """
    one, other = ([(v.geometry.size, len(v.boxes)) for v in some] for some in (first, views))
    if one != other:
        raise UserError(
            "the view sampler returns other views of another image, as ((height, width), region "
            f"slots): {one} and {other}; they must be the same: pad the boxes, with valid=False"
        )
