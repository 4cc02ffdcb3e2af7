"""Fixes the annotations of a COCO json: boxes, masks, areas, ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures.masks import polygon_area

from region_pretrain.data.findings import Findings, id_key
from region_pretrain.errors import UserError

_ROUNDING = 1.0  # pixels that a box may reach out of its image


class AnnotationFixer:
    """Fixes annotations in place.

    Args:
        json_file: path of the json, for error messages.
        images: key of an id (:func:`~region_pretrain.data.findings.id_key`) -> image.
        categories: key of an id -> id of the class.
        findings: counts what is fixed.
        compare_size: compares an image's size with its file.
        turned: ids of images whose width and height were swapped.
    """

    def __init__(
        self,
        json_file: str,
        images: dict[str, dict],
        categories: dict[str, int],
        findings: Findings,
        compare_size: Callable[[dict], None],
        turned: set,
    ) -> None:
        self._file, self._findings, self._compare_size = json_file, findings, compare_size
        self._images, self._categories, self._turned = images, categories, turned
        self._reaching_out = self._fits_as_corners = 0

    def _refuse(self, problem: str) -> NoReturn:
        raise UserError(f"{self._file} {problem}")

    def fix(self, annotations: list[dict]) -> list[dict]:
        """Fix annotations; returns those to keep.

        Raises:
            UserError: an unknown category, or boxes or masks of another format.
        """
        images = {image["id"]: image for image in self._images.values()}
        classes = {v for key, v in self._categories.items() if key == str(v)}  # not renumbered
        kept, ids, without_id = [], set(), []
        for index, a in enumerate(annotations):
            try:  # almost all annotations need nothing
                image = images[a["image_id"]]
                x, y, w, h = a["bbox"]
                segmentation = a.get("segmentation")
                fine = (
                    a["category_id"] in classes
                    and a["iscrowd"] in (0, 1)
                    and a["area"] >= 0
                    and x >= -_ROUNDING
                    and y >= -_ROUNDING
                    and w > 0
                    and h > 0
                    and x + w <= image["width"] + _ROUNDING
                    and y + h <= image["height"] + _ROUNDING
                    and not a.get("ignore")
                    and (
                        "keypoints" not in a
                        or "num_keypoints" in a
                        and not len(a["keypoints"]) % 3
                        and math.isfinite(sum(a["keypoints"]))
                    )
                    and (
                        not segmentation
                        or isinstance(segmentation, list)
                        and all(
                            len(p) >= 6 and not len(p) % 2 and math.isfinite(sum(p))
                            for p in segmentation
                        )
                    )
                )
            except (KeyError, TypeError, ValueError, AttributeError):
                fine = False
            if not fine and not self._fix_annotation(a, index):
                continue
            kept.append(a)
            number = a.get("id")
            if type(number) is int and number > 0 and number not in ids:
                ids.add(number)
            else:
                without_id.append(a)
        next_id = max(ids, default=0) + 1
        for number, a in enumerate(without_id, next_id):
            # pycocotools needs numbers, and takes 0 for "no match".
            self._findings.add(
                "annotation ids missing, repeated or not positive integers; renumbered",
                a.get("id", _place(a)),
            )
            a["id"] = number
        self._refuse_other_box_formats(kept)
        used = {a["category_id"] for a in kept}
        for key, class_id in self._categories.items():
            if class_id not in used:
                self._findings.add("category without boxes", f"id {key}", fixed=False)
        return kept

    def _refuse_other_box_formats(self, kept: list[dict]) -> None:
        if self._fits_as_corners == self._reaching_out >= max(3, 0.3 * len(kept)):
            self._refuse(
                f"has {self._reaching_out} boxes that reach out of their images as [x, y, width, "
                "height] and fit as [x0, y0, x1, y1]: COCO's boxes are [x, y, width, height]"
            )
        if kept and all(max(a["bbox"]) <= 1 for a in kept):
            self._refuse("has boxes in fractions of the image: COCO's boxes are in pixels")

    def _fix_annotation(self, a: dict, index: int) -> bool:
        """Fix one annotation in place; returns whether to keep it."""
        if not isinstance(a, dict):
            self._refuse(f"has an annotation that is not an object: annotations[{index}]={a!r}")
        example = f"annotation {a.get('id', f'number {index + 1}')}"
        image = self._images.get(id_key(a.get("image_id")))
        if image is None:
            self._findings.add("annotation of an image that is not listed; left out", example)
            return False
        if type(a["image_id"]) is not type(image["id"]):
            self._findings.add("image_id of another type than the image's id; converted", example)
        a["image_id"] = image["id"]

        class_id = self._categories.get(id_key(a.get("category_id")))
        if class_id is None:
            known = ", ".join(list(self._categories)[:20])
            self._refuse(
                f"has no category {a.get('category_id')!r}, which {example} names; its ids are "
                f"{known}: add the category or correct the annotation"
            )
        if type(a["category_id"]) is not int:
            self._findings.add("category_id that is not an integer; converted", example)
        a["category_id"] = class_id

        segmentation = self._fix_segmentation(a, image, example)
        box = self._fix_box(a, segmentation, image, example)
        if box is None:
            return False
        if segmentation == []:  # all polygons are too short: tools draw a rectangle as two corners
            x, y, w, h = box
            segmentation = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            self._findings.add("mask of fewer than 3 points; replaced by its box", example)
        if segmentation:
            a["segmentation"] = segmentation

        if not _is_number(a.get("area")) or a["area"] < 0:
            a["area"] = _mask_area(segmentation) if segmentation else box[2] * box[3]
            self._findings.add("no area; computed from the mask or the box", example)
        crowd = _flag(a.get("iscrowd"))
        if crowd is None:
            self._findings.add("no iscrowd; set to 0", example)
            crowd = 0
        elif a["iscrowd"] not in (0, 1):
            self._findings.add("iscrowd as text; converted", example)
        if _flag(a.pop("ignore", 0)):
            self._findings.add("`ignore` set; replaced by iscrowd", example)
            crowd = 1
        a["iscrowd"] = crowd
        if a.get("keypoints", ()) is None:
            del a["keypoints"]
        if "keypoints" in a:
            self._fix_keypoints(a, example)
        if "keypoints" in a and "num_keypoints" not in a:
            a["num_keypoints"] = sum(visibility > 0 for visibility in a["keypoints"][2::3])
            self._findings.add("no num_keypoints; counted", example)
        return True

    def _fix_keypoints(self, a: dict, example: str) -> None:
        given = a["keypoints"]
        if not isinstance(given, list) or len(given) % 3:
            self._refuse(f"has keypoints in {example} that are not x, y and visibility of each")
        points = [given[i : i + 3] for i in range(0, len(given), 3)]
        # Tools write null where a keypoint is not labelled.
        points = [[0, 0, 0] if p[2] in (None, 0) and None in p else p for p in points]
        values = [value for point in points for value in point]
        with suppress(ValueError):
            values = [float(value) if isinstance(value, str) else value for value in values]
        if not all(map(_is_number, values)):
            self._refuse(f"has keypoints in {example} that are not finite numbers: {given!r:.60}")
        if values != given:
            self._findings.add("keypoints as text or null; converted", example)
            a["keypoints"] = values

    def _fix_segmentation(self, a: dict, image: dict, example: str) -> list | dict | None:
        """The valid mask, None without one, or an empty list if no polygon is valid."""
        given = a.get("segmentation")
        if isinstance(given, list) and len(given) == 1 and isinstance(given[0], dict):
            self._findings.add("RLE mask in a list; unwrapped", example)
            given = given[0]
        if isinstance(given, dict) and given:
            size = image["height"], image["width"]
            if given.get("size") != list(size) or not given.get("counts"):
                self._refuse(
                    f"has an RLE mask of size {given.get('size')} in {example}, but the image is "
                    f"{list(size)} (height, width): export the mask again"
                )
            if not _covers(given["counts"], size[0] * size[1]):
                self._refuse(
                    f"has an RLE mask in {example} whose runs are damaged or do not add up to its "
                    f"{size[0]} x {size[1]} pixels: export the mask again"
                )
            return given
        if not isinstance(given, list) or not any(given):
            a.pop("segmentation", None)
            return None
        parts = [_numbers(part) for part in given]
        if None in parts:
            self._refuse(
                f"has a mask in {example} that is neither an RLE mask nor polygons of numbers: "
                "export the mask again"
            )
        # All numbers of one polygon, or its points, as OpenCV's contours have them.
        single = all(isinstance(part, int | float) for part in given)
        single |= len(given) >= 3 and all(len(part) == 2 for part in parts)
        polygons = [[value for part in parts for value in part]] if single else parts
        if single:
            self._findings.add("polygon that is not in a list of polygons; wrapped", example)
        elif polygons != given:
            self._findings.add("polygon that is a list of points; joined", example)
        valid = [p for p in polygons if len(p) >= 6 and len(p) % 2 == 0 and all(map(_is_number, p))]
        if valid and len(valid) < len(polygons):
            self._findings.add("mask with a polygon of fewer than 3 points; left out", example)
        return valid

    def _fix_box(
        self, a: dict, segmentation: list | dict | None, image: dict, example: str
    ) -> list | None:
        given = a.get("bbox")
        box = _four_numbers(given)
        if box is None or box[2] <= 0 or box[3] <= 0:
            wrong = given and box is None
            what = "box that is not four finite numbers" if wrong else "empty or missing box"
            if not segmentation:
                self._findings.add(f"{what}; left out", example)
                return None
            box = _mask_box(segmentation)
            self._findings.add(f"{what}; computed from the mask", example)
        elif box != given:
            self._findings.add("bbox as text; converted", example)
        width, height = image["width"], image["height"]
        x0, y0, x1, y1 = box[0], box[1], box[0] + box[2], box[1] + box[3]
        beyond = max(-x0, -y0, x1 - width, y1 - height)
        if beyond > _ROUNDING:
            self._compare_size(image)
            self._reaching_out += 1
            fits = box[0] < box[2] <= width + _ROUNDING and box[1] < box[3] <= height + _ROUNDING
            self._fits_as_corners += fits
            if image["id"] in self._turned and x1 <= height + 1 and y1 <= width + 1:
                self._refuse(
                    f"has boxes in the stored pixels of {image['file_name']} ({example}), which "
                    "its EXIF orientation turns: label upright images, or remove the orientation"
                )
            x0, y0, x1, y1 = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
            if x1 <= x0 or y1 <= y0:
                self._findings.add("box outside of its image; left out", example)
                return None
            self._findings.add("box that reaches out of its image; clipped", example)
            box = [x0, y0, x1 - x0, y1 - y0]
            if not segmentation:
                a["area"] = box[2] * box[3]
        a["bbox"] = box
        return box


def _place(a: dict) -> str:
    return f"an annotation of image {a['image_id']}"


def _covers(counts: Any, pixels: int) -> bool:
    """Whether RLE counts are valid and add up to the image's pixels; pycocotools does not check."""
    if isinstance(counts, list):
        return all(type(n) is int and n >= 0 for n in counts) and sum(counts) == pixels
    if not isinstance(counts, str) or not counts.isascii():
        return False
    # Five bits a character, the lowest first; 32: the number goes on, 16 in its last one: negative.
    code = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero(code & 32 == 0)
    if code.min() < 0 or code.max() > 63 or not len(ends) or ends[-1] != len(code) - 1:
        return False
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:
        return False
    places = np.arange(len(code)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((code & 31) << 5 * places, starts)
    runs -= np.where(code[ends] & 16, np.int64(1) << 5 * lengths, 0)
    for first in (1, 2):  # from the fourth on, differences from the last but one
        runs[first::2] = np.cumsum(runs[first::2])
    return bool(runs.min() >= 0 and runs.sum() == pixels)


def _numbers(value: Any) -> list | None:
    """A number, or all numbers in nested lists, as one list; None if there is anything else."""
    if isinstance(value, int | float):
        return [value]
    parts = [_numbers(part) for part in value] if isinstance(value, list) else [None]
    return None if None in parts else [number for part in parts for number in part]


def _four_numbers(box: Any) -> list | None:
    """A box's numbers, also of text; None if there are not four finite ones."""
    if not isinstance(box, list) or len(box) != 4:
        return None
    try:
        box = [float(value) if isinstance(value, str) else value for value in box]
    except ValueError:
        return None
    return box if all(map(_is_number, box)) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _mask_area(segmentation: list | dict) -> float:
    """Area in pixels; polygons are summed, as Detectron2 does."""
    if isinstance(segmentation, dict):
        return float(mask_util.area(compressed_rle(segmentation)))
    return sum(float(polygon_area(np.array(p[::2]), np.array(p[1::2]))) for p in segmentation)


def _mask_box(segmentation: list | dict) -> list[float]:
    if isinstance(segmentation, dict):
        return mask_util.toBbox(compressed_rle(segmentation)).tolist()
    xs = [x for p in segmentation for x in p[::2]]
    ys = [y for p in segmentation for y in p[1::2]]
    return [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]


def compressed_rle(rle: dict) -> dict:
    """An RLE mask with its counts compressed, as Detectron2 needs it."""
    return mask_util.frPyObjects(rle, *rle["size"]) if isinstance(rle["counts"], list) else rle


def _flag(value: Any) -> int | None:
    """0 or 1, also of a boolean or a text; None for anything else."""
    known = {"0": 0, "1": 1, "false": 0, "true": 1}
    return known.get(str(value).strip().lower().removesuffix(".0"))
