"""The one reader of image files: 8-bit RGB, upright, transparency on white."""

from region_pretrain.images.encoded import EncodedImage, read_image, read_record, tolerated_files
from region_pretrain.images.mapper import SamePixels
from region_pretrain.images.opening import FileSystemFailure
from region_pretrain.images.reading import (
    Reading,
    UnreadableImage,
    readings_of,
    size_mismatch,
)

__all__ = [
    "EncodedImage",
    "FileSystemFailure",
    "Reading",
    "SamePixels",
    "UnreadableImage",
    "read_image",
    "read_record",
    "readings_of",
    "size_mismatch",
    "tolerated_files",
]
