"""Boxes in JSON files: COCO's results and annotations, and masks in the form of SAM's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.utils.file_io import PathManager

from region_pretrain.regions.elsewhere.json_stream import JsonStream, NotJson
from region_pretrain.regions.elsewhere.table import BoxTable, Collector, errors_name, name_of

_COCO_LISTS = ("categories", "licenses")
_WHAT = "a JSON file of boxes"


@contextmanager
def open_stream(path: str) -> Iterator[JsonStream]:
    """Open a JSON file; errors within become a :class:`UserError` that names it."""
    with (
        errors_name(path, _WHAT),
        open(PathManager.get_local_path(path), encoding="utf-8-sig") as file,
    ):
        yield JsonStream(file)


def read_json_boxes(path: str) -> BoxTable:
    """Read boxes ``[x, y, width, height]`` of many images.

    The file is one of

    - COCO's results, ``[{"image_id" or "file_name", "bbox", "score"}, ...]``; a mask's score may
      be its ``predicted_iou``;
    - COCO's annotations, ``{"images": [...], "annotations": [...]}``, of which crowds are left out;
    - masks by image, ``{"file name": [{"bbox", "predicted_iou"}, ...], ...}``.

    Raises:
        UserError: the file is damaged or in another format.
    """
    with open_stream(path) as stream:
        if stream.peek() == "[":
            return _results(stream)
        if stream.peek() == "{":
            return _object(stream)
        raise ValueError("it starts with neither [ nor {")


def read_image_names(path: str) -> dict[str, str]:
    """The ids and file names of the images of a COCO json.

    Raises:
        UserError: the file is damaged or has no images.
    """
    names: dict[str, str] = {}
    with open_stream(path) as stream:
        for key in stream.members():
            if key == "images":
                names, _ = _images(stream)
            else:
                stream.value()
        if not names:
            raise ValueError("it has no images")
    return names


def read_masks(path: str) -> BoxTable:
    """Read the masks of one image, ``[{"bbox", "predicted_iou"}, ...]``, alone or in SA-1B's form.

    Returns:
        A table of one image, without a name of its own.

    Raises:
        UserError: the file is damaged or in another format.
    """
    found, sizes = Collector(), {}
    row = found.image("")
    with open_stream(path) as stream:
        if stream.peek() == "[":
            _add_all(stream.items(), found, row)
        else:
            for key in stream.members():
                if key == "annotations":
                    _add_all(stream.items(), found, row)
                elif key == "image":
                    sizes = _size("", stream.value())
                else:
                    stream.value()
        stream.end()
        return found.table(by_id=False, sizes=sizes)


def _results(stream: JsonStream) -> BoxTable:
    found, kind = Collector(), ""

    def add(entry: dict[str, Any]) -> None:
        nonlocal kind
        kind = kind or ("file_name" if "file_name" in entry else "image_id")
        _add(found, found.image(name_of(entry[kind])), entry)

    _for_each(stream.items(), add)
    stream.end()
    return found.table(by_id=kind == "image_id")


def _object(stream: JsonStream) -> BoxTable:
    """An object of COCO's lists, or of lists of masks by image."""
    names: dict[str, str] | None = None
    annotations: Collector | None = None
    masks, fault, sizes = Collector(), None, {}
    for key in stream.members():
        if key == "images" and stream.peek() == "[":
            names, sizes = _images(stream)
        elif key == "annotations" and stream.peek() == "[":
            annotations = _annotations(stream)
        else:
            value = stream.value()
            if isinstance(value, list) and key not in _COCO_LISTS and fault is None:
                try:
                    _add_all(value, masks, masks.image(key))
                except (ValueError, TypeError, OverflowError) as error:
                    fault = ValueError(f"image {key[:60]!r}: {error}")
    stream.end()
    if annotations is not None:
        table = annotations.table(by_id=True)
        return named(table, names)._replace(sizes=sizes) if names else table
    if names is not None:
        raise ValueError("it has images, but no annotations")
    if fault is not None:
        raise fault
    if not masks.images:
        raise ValueError("it has neither annotations nor lists of boxes by image")
    return masks.table(by_id=False)


def named(table: BoxTable, names: dict[str, str]) -> BoxTable:
    """A table by file name instead of id; images that ``names`` lacks keep their id.

    Args:
        table: by id.
        names: id -> file name.

    Raises:
        ValueError: none of the ids is known.
    """
    known = sum(name in names for name in table.names)
    if table.names and not known:
        raise ValueError(
            f"its image ids, e.g. {table.names[0]}, are not those of the json that lists the images"
        )
    return table._replace(names=[names.get(name, name) for name in table.names], by_id=False)


def _annotations(stream: JsonStream) -> Collector:
    """COCO's ``annotations`` without crowds."""
    found = Collector()

    def add(entry: dict[str, Any]) -> None:
        if not entry.get("iscrowd"):
            _add(found, found.image(name_of(entry["image_id"])), entry)

    _for_each(stream.items(), add)
    return found


def _images(stream: JsonStream) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """id -> file name, and file name -> (width, height), of COCO's ``images``."""
    names, sizes = {}, {}

    def add(image: dict[str, Any]) -> None:
        name = image["file_name"]
        if not isinstance(name, str):
            raise ValueError("its file_name is not text")
        names[name_of(image["id"])] = name
        sizes.update(_size(name, image))

    _for_each(stream.items(), add, "image")
    return names, sizes


def _size(name: str, image: dict[str, Any]) -> dict[str, tuple[int, int]]:
    width, height = image.get("width"), image.get("height")
    return {name: (int(width), int(height))} if width and height else {}


def _add_all(entries: Iterable[Any], found: Collector, row: int) -> None:
    _for_each(entries, lambda entry: _add(found, row, entry))


def _add(found: Collector, row: int, entry: dict[str, Any]) -> None:
    score = entry.get("score")
    found.add(row, entry["bbox"], entry.get("predicted_iou") if score is None else score)


def _for_each(
    entries: Iterable[Any], use: Callable[[dict[str, Any]], None], what: str = "entry"
) -> None:
    """Call ``use`` on each entry, and name that in an error; entries are counted from 0."""
    n = -1
    try:
        for entry in entries:
            n += 1
            use(entry)
    except NotJson:
        raise
    except KeyError as error:
        raise ValueError(f"{what} {n} has no {error.args[0]}") from error
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{what} {n}: {error}") from error
