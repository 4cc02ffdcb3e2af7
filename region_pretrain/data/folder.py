"""Plain folders of images as data sets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Sequence

from detectron2.utils.file_io import PathManager

from region_pretrain.dataset_names import parse
from region_pretrain.errors import UserError

logger = logging.getLogger(__name__)

FOLDER_PREFIX = "folder://"
IMAGE_EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .avif .jp2 .bmp .tif .tiff .ppm .pgm".split()
)

#: Endings of images that are not read. Their number is a warning; other files are only counted.
_OTHER_IMAGES = set(
    ".heic .heif .jxl .svg .psd .dng .raw .cr2 .cr3 .nef .arw .orf .rw2 .exr .hdr .dcm".split()
)


def load_image_folder(root: str) -> list[dict]:
    """All images in a folder and its subfolders, recognised by extension, sorted by path.

    Hidden files and folders are skipped, and so are output folders of runs and sweeps and the
    previews of region stores; links to folders are followed. Files with other endings are counted
    in the log.

    Returns:
        Records whose ``image_id`` is the path relative to ``root``, separated by ``/``.

    Raises:
        UserError: no such folder, no images, or a file name that is not UTF-8.
    """
    folder = local_folder(root)
    listing = _Listing()
    try:
        listing.walk(folder)
    except OSError as error:
        raise UserError(f"the image folder {root} cannot be read: {error}") from error
    others = ", ".join(f"{n} {ending}" for ending, n in listing.others.most_common(8))
    if not listing.images:
        found = f"; its files: {others}" if others else ""
        known = " ".join(IMAGE_EXTENSIONS)
        raise UserError(f"the image folder {root} has no images ({known}){found}")
    if others:
        images = set(listing.others) & _OTHER_IMAGES
        hint = f"; convert {' '.join(sorted(images))} to use these images" if images else ""
        level = logging.WARNING if images else logging.INFO
        logger.log(level, "%s: skipped files that are not read: %s%s", root, others, hint)
    for output in listing.outputs:
        logger.info("%s: skipped %s, which is an output", root, output)
    paths = sorted(listing.images)
    try:
        "".join(paths).encode()
    except UnicodeEncodeError as error:
        bad = next(p for p in paths if any("\ud800" <= c <= "\udfff" for c in p))
        raise UserError(f"{folder}: the file name {bad!a} is not UTF-8; rename it") from error
    return [{"file_name": os.path.join(folder, path), "image_id": path} for path in paths]


def local_folder(root: str) -> str:
    """The folder as an absolute or relative local path.

    Raises:
        UserError: there is no such folder.
    """
    folder = PathManager.get_local_path(os.path.expanduser(root))
    if not os.path.isdir(folder):
        raise UserError(f"no such image folder: {root or repr(root)}")
    return folder


class _Listing:
    """The files below a folder.

    Attributes:
        images: paths relative to the folder.
        others: ending, in lower case -> number of other files.
        outputs: relative paths of outputs of this library.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.others: Counter[str] = Counter()
        self.outputs: list[str] = []

    def walk(self, folder: str, relative: str = "", above: tuple[str, ...] = ()) -> None:
        """Add a folder; ``above`` are the parent folders, to stop at loops of links."""
        real = os.path.realpath(folder)
        if real in above:
            return
        with os.scandir(folder) as entries:
            visible = {entry.name: entry for entry in entries if not entry.name.startswith(".")}
        if relative and _is_output_folder(visible):
            self.outputs.append(relative)
            return
        for name, entry in visible.items():
            if entry.is_dir():
                self.walk(entry.path, f"{relative}{name}/", (*above, real))
            elif name.removesuffix(".preview.png") != name and (
                name.removesuffix(".preview.png") in visible
            ):
                self.outputs.append(relative + name)
            elif name.lower().endswith(IMAGE_EXTENSIONS):
                self.images.append(relative + name)
            else:
                self.others[os.path.splitext(name)[1].lower() or "without ending"] += 1


def _is_output_folder(names: Container[str]) -> bool:
    """Whether a folder with these files is that of a run or a sweep."""
    return "sweep.json" in names or "config.yaml" in names and "metrics.json" in names


def refuse_output_among_images(path: str, names: str | Sequence[str]) -> None:
    """Refuse to write an image into a folder whose images are a data set.

    Args:
        path: the file to write.
        names: data sets.

    Raises:
        UserError: ``path`` is in a ``folder://DIR`` of ``names``.
    """
    for name in [names] if isinstance(names, str) else names:
        if not name.startswith(FOLDER_PREFIX) or not path.lower().endswith(IMAGE_EXTENSIONS):
            continue
        folder = os.path.realpath(parse(name).path)
        if os.path.commonpath([folder, os.path.realpath(path)]) == folder:
            raise UserError(
                f"{path} would become one of the images of {name}: choose a file outside this "
                "folder"
            )
