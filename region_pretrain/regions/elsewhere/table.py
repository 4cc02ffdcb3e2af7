"""The boxes of many images in a few arrays."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from region_pretrain.errors import UserError, describe


class BoxTable(NamedTuple):
    """The boxes of ``n`` images, ``m`` in total.

    Attributes:
        names: ids or file names of the images, all different.
        by_id: whether ``names`` are ids.
        offsets: ``(n + 1,)`` int64 into ``boxes``.
        boxes: ``(m, 4)`` float32 XYXY in pixels, as they were given.
        scores: ``(m,)`` float32; None if the file has none.
        sizes: name -> ``(width, height)`` of the image that the boxes are for, where stated.
    """

    names: list[str]
    by_id: bool
    offsets: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray | None
    sizes: Mapping[str, tuple[int, int]]

    @classmethod
    def of(
        cls,
        names: list[str],
        by_id: bool,
        rows: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray | None,
        sizes: Mapping[str, tuple[int, int]] | None = None,
    ) -> BoxTable:
        """Group boxes by their image.

        Args:
            names, by_id, sizes: see :class:`BoxTable`.
            rows: ``(m,)`` position in ``names`` of each box.
            boxes: ``(m, 4)`` XYXY.
            scores: ``(m,)`` or None.

        Raises:
            ValueError: the coordinates are fractions of the image's sides.
        """
        if len(boxes):
            finite = boxes[np.isfinite(boxes).all(axis=1)]
            if len(finite) and finite.max() < 2 and (finite % 1).any():  # 1 + rounding of x + width
                raise ValueError(
                    "all coordinates are fractions of the image's sides: they must be its pixels"
                )
        order = np.argsort(rows, kind="stable")
        offsets = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(names)))])
        with np.errstate(over="ignore"):  # a value beyond float32 becomes inf, and is dropped
            boxes = boxes.astype(np.float32)[order]
            scores = None if scores is None else scores.astype(np.float32)[order]
        return cls(names, by_id, offsets.astype(np.int64), boxes, scores, sizes or {})


class Collector:
    """Collects boxes one at a time in little memory."""

    def __init__(self) -> None:
        self._rows: dict[str, int] = {}
        self._images, self._boxes, self._scores = array("i"), array("d"), array("d")

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self._rows)

    def image(self, name: str) -> int:
        """The row of an image, which may remain without boxes."""
        return self._rows.setdefault(name, len(self._rows))

    def add(self, row: int, box: Sequence[float], score: float | None) -> None:
        """Add a box of the image in this row.

        Raises:
            ValueError, TypeError, OverflowError: not four numbers; or only some boxes have scores.
        """
        if not isinstance(box, list) or len(box) != 4:
            raise ValueError(f"bbox {str(box)[:60]} is not a list of 4 numbers")
        if (score is None) != (not self._scores) and self._images:
            raise ValueError("some boxes have a score and others have none")
        self._boxes.extend(box)
        if score is not None:
            self._scores.append(score)
        self._images.append(row)

    def table(self, by_id: bool, sizes: Mapping[str, tuple[int, int]] | None = None) -> BoxTable:
        """Everything that was added. Boxes are added as ``(x, y, width, height)``.

        Args:
            by_id: see :class:`BoxTable`.
            sizes: see :class:`BoxTable`.
        """
        boxes = np.frombuffer(self._boxes, np.float64).reshape(-1, 4).copy()
        boxes[:, 2:] += boxes[:, :2]
        scores = np.frombuffer(self._scores, np.float64) if self._scores else None
        rows = np.frombuffer(self._images, np.int32)
        return BoxTable.of(list(self._rows), by_id, rows, boxes, scores, sizes)


def name_of(value: Any) -> str:
    """An image's id or file name as text: 139, 139.0 and "139" are the same id.

    Raises:
        ValueError: it is neither text nor a whole number.
    """
    if isinstance(value, str) and value:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value // 1:
        return str(int(value))
    raise ValueError(f"{str(value)[:60]!r} is neither an id nor a file name of an image")


@contextlib.contextmanager
def errors_name(path: str, what: str) -> Iterator[None]:
    """Turn the errors of reading a file into a :class:`UserError` that names it.

    Args:
        path: the file.
        what: what it should be, e.g. ``a file of boxes``.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # damaged bytes raise many kinds of exceptions
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path} cannot be read: {error.strerror}") from error
        reason = str(error) if type(error) is ValueError else describe(error)
        raise UserError(f"{path} is not {what}: {' '.join(reason.split())[:300]}") from error
