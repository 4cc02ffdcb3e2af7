"""Detectron2's mappers, with the pixels of ``region_pretrain.images``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any

from detectron2.data import detection_utils

from region_pretrain.errors import UserError
from region_pretrain.images.encoded import EncodedImage, read_record
from region_pretrain.images.opening import reading_error
from region_pretrain.images.reading import size_mismatch

_FORMATS = ("RGB", "BGR", "L", "YUV-BT.601")
_current: ContextVar[Mapping[str, Any] | None] = ContextVar("record being mapped", default=None)


class SamePixels:
    """A mapper whose images are read as in pre-training.

    While the mapper runs, ``detection_utils.read_image(record["file_name"], format=...)`` reads
    with :func:`~region_pretrain.images.encoded.read_record`, and so with the record's ``reading``.
    Other files, e.g. segmentation maps, and calls outside such a mapper are read by Detectron2.

    Args:
        mapper: converts a record to a model's input.
    """

    def __init__(self, mapper: Callable[[dict], Any]) -> None:
        self.mapper = mapper

    def __call__(self, record: dict) -> Any:
        """Map a record.

        Raises:
            UnreadableImage: the image is missing, damaged or too large; the message names it.
            UserError: the file system fails, or the size of the image contradicts the record.
        """
        _install()
        name = record.get("file_name", "")
        # The mapper may change the record.
        read = {key: record.get(key) for key in ("file_name", "crop", "reading")}
        token = _current.set(read)
        try:
            return self.mapper(record)
        except detection_utils.SizeMismatchError as error:
            found = EncodedImage.read(name, read["crop"]).size()
            declared = record.get("width"), record.get("height")
            if found == declared:  # the mapper compares with something else
                raise UserError(f"{name}: {error}") from error
            raise size_mismatch(name, found, declared) from error
        except OSError as error:  # of a mapper that opens the image in its own way
            raise reading_error(error, name) from error
        finally:
            _current.reset(token)


def _install() -> None:
    """Let Detectron2's ``read_image`` ask for the current record, unless someone replaced it."""
    original = detection_utils.read_image
    if original.__module__ != detection_utils.__name__:
        return

    def read_image(file_name: str, format: str | None = None) -> Any:
        record = _current.get()
        if record is None or record["file_name"] != file_name or format not in _FORMATS:
            return original(file_name, format)
        return read_record(record, format)

    detection_utils.read_image = read_image
