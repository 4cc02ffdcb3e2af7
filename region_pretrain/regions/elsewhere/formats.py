"""Recognises and reads files and folders of boxes."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from detectron2.utils.file_io import PathManager

from region_pretrain.errors import UserError
from region_pretrain.files import sha256_of
from region_pretrain.regions.elsewhere.csv_boxes import header_of, read_csv
from region_pretrain.regions.elsewhere.json_boxes import named, read_image_names, read_json_boxes
from region_pretrain.regions.elsewhere.pickles import read_proposals
from region_pretrain.regions.elsewhere.table import BoxTable, errors_name

_FILES = {"coco": read_json_boxes, "detectron2": read_proposals, "csv": read_csv}
_FOLDERS = {"masks": ".json", "label-maps": ".png"}
#: The formats of files, then those of folders with one file per image.
FORMATS = (*_FILES, *_FOLDERS)


@dataclass
class Boxes:
    """The boxes of another program.

    Attributes:
        path: the file or folder.
        format: one of :data:`FORMATS`.
        digest: 16 hexadecimal digits of the sha256 of the file, which of a file alone are those
            that ``sha256sum`` prints first.
        table: the boxes of a file; None for a folder.
        files: file names relative to a folder, sorted.
    """

    path: str
    format: str
    digest: str
    table: BoxTable | None = None
    files: list[str] = field(default_factory=list)


def load_boxes(path: str, format: str | None = None, ids: str | None = None) -> Boxes:
    """Read a file of boxes, or list a folder with one file per image.

    Args:
        path: the file or folder.
        format: one of :data:`FORMATS`; None: recognised by the content.
        ids: COCO json that lists the images' ids and file names, for a file with ids.

    Raises:
        UserError: nothing there, an unknown format, or a damaged file.
    """
    local = PathManager.get_local_path(os.path.expanduser(path))
    if not os.path.exists(local):
        raise UserError(f"no such file or folder of boxes: {path}")
    if format is not None and format not in FORMATS:
        raise UserError(f"--format {format}: must be one of {', '.join(FORMATS)}")
    if os.path.isdir(local):
        if format in _FILES:
            raise UserError(f"{path} is a folder, and --format {format} is that of a file")
        if ids is not None:
            raise UserError(f"--ids is for a file with image ids, and {path} is a folder")
        return _folder(path, local, format)
    if format in _FOLDERS:
        raise UserError(f"--format {format} is a folder with a file per image; {path} is a file")
    format = format or _recognise(path, local)
    digest = _sha256(local)
    table = _FILES[format](local)
    if ids is not None:
        if not table.by_id:
            raise UserError(f"--ids is for a file with image ids, and {path} has file names")
        names = read_image_names(ids)
        with errors_name(path, f"a file of the images in {ids}"):
            table = named(table, names)
        digest = hashlib.sha256((digest + _sha256(ids)).encode()).hexdigest()
    return Boxes(path, format, digest[:16], table)


def _recognise(path: str, local: str) -> str:
    with errors_name(path, "a file of boxes"), open(local, "rb") as file:
        start = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    if start[:1] in (b"[", b"{"):
        return "coco"
    if start[:1] == b"\x80":
        return "detectron2"
    if header_of(local):
        return "csv"
    raise UserError(
        f"{path} has none of the known formats: a JSON file of boxes or masks, Detectron2's "
        "proposals (a pickle), a CSV file with the header file_name,x0,y0,x1,y1, or a folder of "
        "JSON files or PNG label maps"
    )


def _folder(path: str, local: str, format: str | None) -> Boxes:
    """A folder; hidden files are skipped."""
    files: dict[str, list[str]] = {ending: [] for ending in _FOLDERS.values()}
    for folder, folders, names in os.walk(local, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            ending = os.path.splitext(name)[1].lower()
            if ending in files and not name.startswith("."):
                relative = os.path.relpath(os.path.join(folder, name), local)
                files[ending].append(relative.replace(os.sep, "/"))
    present = [name for name, ending in _FOLDERS.items() if files[ending]]
    if format is None and len(present) > 1:
        raise UserError(f"{path} has JSON and PNG files: give --format masks or label-maps")
    format = format or (present[0] if present else None)
    if format not in present:
        raise UserError(f"{path} has no {format and _FOLDERS[format] or '.json or .png'} files")
    chosen = sorted(files[_FOLDERS[format]])
    digest = hashlib.sha256()
    for name in chosen:
        digest.update(f"{_sha256(os.path.join(local, name))}  {name}\n".encode())
    return Boxes(local, format, digest.hexdigest()[:16], files=chosen)


def _sha256(path: str) -> str:
    with errors_name(path, "a file"):
        return sha256_of(PathManager.get_local_path(path))
