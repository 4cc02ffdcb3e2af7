"""Plain folders of images as data sets."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Container, Sequence
from pathlib import Path

from detectron2.utils.file_io import PathManager

from region_pretrain.dataset_names import parse
from region_pretrain.errors import UserError
from region_pretrain.files import printable

logger = logging.getLogger(__name__)

_SKIPPED_SHOWN = 20

FOLDER_PREFIX = "folder://"
IMAGE_EXTENSIONS = tuple(
    ".jpg .jpeg .jpe .jfif .png .webp .gif .avif .jp2 .bmp .tif .tiff .ppm .pgm .pbm .pnm".split()
)

#: Endings of images that are not read. Their number is a warning; other files are only counted.
_OTHER_IMAGES = set(
    ".heic .heif .jxl .svg .psd .dng .raw .cr2 .cr3 .nef .arw .orf .rw2 .exr .hdr .dcm".split()
)


def load_image_folder(root: str) -> list[dict]:
    """All images in a folder and its subfolders, recognised by extension, sorted by path.

    Only regular files count; links are followed, and a link to nothing is an unreadable image.
    Hidden files and folders are skipped, and so are output folders of runs and sweeps and the
    previews of region stores. Files with other endings are counted in the log. Pipes, devices,
    links to themselves, names that are not UTF-8 and unreadable subfolders are skipped and listed
    there with the reason.

    Returns:
        Records whose ``image_id`` is the path relative to ``root``, separated by ``/``.

    Raises:
        UserError: no such folder, or no images.
    """
    folder = local_folder(root)
    listing = _Listing()
    try:
        listing.walk(folder)
    except OSError as error:
        raise UserError(f"the image folder {root} cannot be read: {error}") from error
    others = ", ".join(f"{n} {ending}" for ending, n in listing.others.most_common(8))
    if listing.skipped:
        shown = "; ".join(
            f"{printable(path)}: {reason}" for path, reason in listing.skipped[:_SKIPPED_SHOWN]
        )
        rest = len(listing.skipped) - _SKIPPED_SHOWN
        more = f"; and {rest} more" if rest > 0 else ""
        logger.warning("%s: skipped %d: %s%s", root, len(listing.skipped), shown, more)
    if not listing.images:
        found = f"; its files: {others}" if others else ""
        found += f"; {len(listing.skipped)} were skipped, see above" if listing.skipped else ""
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
        skipped: (relative path, reason) of what cannot be used.
    """

    def __init__(self) -> None:
        self.images: list[str] = []
        self.others: Counter[str] = Counter()
        self.outputs: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def walk(self, folder: str) -> None:
        """Add a folder and its subfolders.

        Raises:
            OSError: the folder itself cannot be listed.
        """
        # Each with its parent folders, to stop at loops of links.
        todo: list[tuple[str, str, tuple[tuple[int, int], ...]]] = [(folder, "", ())]
        while todo:
            path, relative, above = todo.pop()
            try:
                status = os.stat(path)
                this = (status.st_dev, status.st_ino)
                if this in above:
                    continue
                with os.scandir(path) as found:
                    entries = {e.name: e for e in found if not e.name.startswith(".")}
            except OSError as error:
                if not relative:
                    raise
                self.skipped.append((relative, f"cannot be listed, {error.strerror}"))
                continue
            if relative and _is_output_folder(entries):
                self.outputs.append(relative)
                continue
            for entry in entries.values():
                if self._is_folder(entry, relative, entries):
                    todo.append((entry.path, f"{relative}{entry.name}/", (*above, this)))

    def _is_folder(self, entry: os.DirEntry, relative: str, siblings: Container[str]) -> bool:
        """Add an entry if it is a file; otherwise, return whether it is a folder to be added."""
        name = entry.name
        original = name.removesuffix(".preview.png")
        kind = _kind(entry)
        if kind == "folder":
            return True
        if kind != "file":
            self.skipped.append((relative + name, kind))
        elif original != name and original in siblings:
            self.outputs.append(relative + name)
        elif name.lower().endswith(IMAGE_EXTENSIONS):
            self.images.append(relative + name)
        else:
            self.others[os.path.splitext(name)[1].lower() or "without ending"] += 1
        return False


def _kind(entry: os.DirEntry) -> str:
    """``folder``, ``file``, or why an entry is neither."""
    try:
        entry.name.encode()
        if entry.is_dir():
            return "folder"
        # A link to nothing is a missing file, which is reported when it is read.
        return "file" if entry.is_file() or _is_dangling(entry) else "not a regular file"
    except UnicodeEncodeError:
        return "its name is not UTF-8"
    except OSError as error:
        return error.strerror


def _is_dangling(entry: os.DirEntry) -> bool:
    return entry.is_symlink() and not os.path.exists(entry.path)


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
        folder = Path(os.path.realpath(parse(name).path))
        if Path(os.path.realpath(path)).is_relative_to(folder):
            raise UserError(
                f"{path} would become one of the images of {name}: choose a file outside this "
                "folder"
            )
