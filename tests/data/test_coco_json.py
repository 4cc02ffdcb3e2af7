"""COCO jsons as labelling tools write them: what is fixed evaluates perfectly, the rest is refused.

Detections equal to the labels must have an AP of 100 with Detectron2's own evaluator.
"""

import json
import os
import unicodedata

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, BoxMode, Instances, polygons_to_bitmask
from PIL import Image

from region_pretrain.data import coco_fixes, coco_json
from region_pretrain.data.coco_json import load_coco
from region_pretrain.errors import UserError

WIDTH, HEIGHT = 60, 40


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def perfect_ap(data, name="perfect"):
    """AP of detections that equal the labels: (box AP, mask AP or None)."""
    MetadataCatalog.pop(name, None)
    MetadataCatalog.get(name).set(
        json_file=data.json_file,
        thing_classes=data.classes,
        thing_dataset_id_to_contiguous_id={c: i for i, c in enumerate(data.category_ids)},
    )
    evaluator = COCOEvaluator(name, distributed=False)
    evaluator.reset()
    for record in data.records:
        found = [a for a in record["annotations"] if not a["iscrowd"]]
        output = Instances((record["height"], record["width"]))
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in found]
        output.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        output.scores = torch.ones(len(found))
        output.pred_classes = torch.tensor([a["category_id"] for a in found], dtype=torch.int64)
        if found and all("segmentation" in a for a in found):
            output.pred_masks = torch.tensor(np.stack([bitmap(a, record) for a in found]))
        evaluator.process([record], [{"instances": output}])
    results = evaluator.evaluate()
    return results["bbox"]["AP"], results.get("segm", {}).get("AP")


def bitmap(annotation, record):
    mask = annotation["segmentation"]
    if isinstance(mask, dict):
        return mask_util.decode(mask).astype(bool)
    return polygons_to_bitmask(mask, record["height"], record["width"])


def each(key, edit):
    """A change that edits each entry of a list of the json."""
    return lambda data: [edit(entry) for entry in data[key]]


def first(key, **values):
    """A change of the first entry of a list of the json."""
    return lambda data: data[key][0].update(values)


FIXES = {
    "no area": (each("annotations", lambda a: a.pop("area")), "no area; computed", 6),
    "area of a text": (first("annotations", area="200"), "no area; computed", 1),
    "no iscrowd": (each("annotations", lambda a: a.pop("iscrowd")), "no iscrowd; set to 0", 6),
    "crowd as text": (first("annotations", iscrowd="1"), "iscrowd as text; converted", 1),
    "no size": (
        each("images", lambda i: (i.pop("width"), i.pop("height"))),
        "no width or height; taken from the file", 3,
    ),
    "size as text": (first("images", width="60", height=40.0), "width or height is not an int", 1),
    "size of zero": (first("images", width=0, height=0), "no width or height; taken from", 1),
    "one image id as text": (
        lambda d: (d["images"][0].update(id="a"),
                   [a.update(image_id="a") for a in d["annotations"][:2]]),
        "image ids of two types", 2,
    ),
    "one number as text": (first("images", id="1"), "image ids of two types", 1),
    "image_id as text": (first("annotations", image_id="1"), "image_id of another type", 1),
    "category ids as text": (
        lambda d: (each("categories", lambda c: c.update(id=str(c["id"])))(d),
                   each("annotations", lambda a: a.update(category_id=str(a["category_id"])))(d)),
        "category ids that are not integers", 1,
    ),
    "category names as ids": (
        lambda d: (each("categories", lambda c: c.update(id=c["name"]))(d),
                   each("annotations", lambda a: a.update(category_id="ant"))(d)),
        "category ids that are not integers", 1,
    ),
    "category_id as text": (first("annotations", category_id="3"), "category_id that is not", 1),
    "two points": (
        first("annotations", segmentation=[[1, 1, 5, 5]]), "mask of fewer than 3 points", 1,
    ),
    "one polygon of two points": (
        lambda d: d["annotations"][0]["segmentation"].append([1, 1, 5, 5]),
        "mask with a polygon of fewer than 3 points", 1,
    ),
    "flat polygon": (
        first("annotations", segmentation=rectangle(2, 3, 20, 10)[0]),
        "polygon that is not in a list of polygons", 1,
    ),
    "polygon of points": (
        first("annotations", segmentation=[[2, 3], [22, 3], [22, 13], [2, 13]]),
        "polygon that is not in a list of polygons", 1,
    ),
    "contour of OpenCV": (
        first("annotations", segmentation=[[[2, 3]], [[22, 3]], [[22, 13]], [[2, 13]]]),
        "polygon that is not in a list of polygons", 1,
    ),
    "list of contours": (
        first("annotations", segmentation=[[[[2, 3]], [[22, 3]], [[22, 13]], [[2, 13]], [[2, 9]],
                                            [[2, 5]]]]),
        "polygon that is a list of points; joined", 1,
    ),
    "list of points": (
        first("annotations", segmentation=[[[2, 3], [22, 3], [22, 13], [2, 13]]]),
        "polygon that is a list of points; joined", 1,
    ),
    "RLE in a list": (
        lambda d: d["annotations"][0].update(segmentation=[rle(2, 3, 20, 10, False)]),
        "RLE mask in a list; unwrapped", 1,
    ),
    "no box": (lambda d: d["annotations"][0].pop("bbox"), "missing box; computed from", 1),
    "negative box": (first("annotations", bbox=[22, 13, -20, -10]), "box; computed from", 1),
    "empty box": (first("annotations", bbox=[2, 3, 0, 10], segmentation=[]), "box; left out", 1),
    "nan": (
        first("annotations", bbox=[float("nan"), 3, 4, 10], segmentation=[]), "numbers; left", 1,
    ),
    "box as text": (first("annotations", bbox=["2", "3.0", 20, "1e1"]), "bbox as text; conv", 1),
    "box of words": (first("annotations", bbox=["a"] * 4), "finite numbers; computed from", 1),
    "box reaches out": (
        first("annotations", bbox=[-5, 3, 20, 10], segmentation=rectangle(0, 3, 15, 10)),
        "box that reaches out of its image; clipped", 1,
    ),
    "box outside": (first("annotations", bbox=[70, 3, 20, 10]), "box outside of its image", 1),
    "unknown image": (first("annotations", image_id=99), "annotation of an image that is not", 1),
    "annotation id 0": (first("annotations", id=0), "annotation ids missing, repeated", 1),
    "annotation ids repeated": (
        each("annotations", lambda a: a.update(id=5)), "annotation ids missing, repeated", 5,
    ),
    "annotation ids missing": (
        each("annotations", lambda a: a.pop("id")), "annotation ids missing, repeated", 6,
    ),
    "annotation ids as text": (first("annotations", id="x1"), "annotation ids missing", 1),
    "categories of one name": (
        lambda d: d["categories"].append({"id": 9, "name": "ant"})
        or d["annotations"][0].update(category_id=9),
        "categories of one name; merged", 1,
    ),
    "no info": (lambda d: d.pop("info"), "no `info`; added", 1),
    "ignore": (first("annotations", ignore=1), "`ignore` set; replaced by iscrowd", 1),
    "backslashes": (
        lambda d: d["images"][0].update(file_name=".\\0.jpg"), "backslash in a file name", 1,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("on_disk", "in_json"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_file_names_in_another_unicode_form(write_coco, on_disk, in_json):
    json_file, root = write_coco()
    on_disk, in_json = (unicodedata.normalize(form, "Küche.jpg") for form in (on_disk, in_json))
    os.rename(f"{root}/1.jpg", f"{root}/{on_disk}")
    with open(json_file) as file:
        data = json.load(file)
    data["images"][1]["file_name"] = in_json
    with open(json_file, "w") as file:
        json.dump(data, file)
    loaded = load_coco(json_file, root)
    (finding,) = [f for f in loaded.findings if "Unicode" in f.what]
    assert (finding.count, finding.example) == (1, in_json)
    assert loaded.records[1]["file_name"] == f"{root}/{on_disk}"
    assert perfect_ap(loaded) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize("kind", FIXES)
def test_what_is_fixed_evaluates_perfectly(write_coco, kind):
    change, text, count = FIXES[kind]
    data = load_coco(*write_coco(change))
    found = {f.what: f.count for f in data.findings if text in f.what}
    assert list(found.values()) == [count], data.findings
    assert all(f.fixed or "without boxes" in f.what for f in data.findings)
    assert data.fixed and data.json_file != data.source
    assert perfect_ap(data) == (pytest.approx(100), pytest.approx(100))
    # Stock Detectron2 reads the same from the fixed json, in which there is nothing left to fix.
    stock = load_coco_json(data.json_file, data.image_root, f"stock of {kind}")
    assert stock == data.records
    again = load_coco(data.json_file, data.image_root)
    assert again.records == data.records and not again.fixed


def test_values_of_the_fixes(write_coco):
    def boxes(change):
        return load_coco(*write_coco(change)).records[0]["annotations"]

    assert boxes(FIXES["box reaches out"][0])[0]["bbox"] == [0, 3, 15, 10]
    assert boxes(FIXES["negative box"][0])[0]["bbox"] == [2, 3, 20, 10]
    assert boxes(FIXES["two points"][0])[0]["segmentation"] == rectangle(2, 3, 20, 10)
    assert [len(boxes(FIXES[k][0])) for k in ("empty box", "box outside", "ignore")] == [1, 1, 2]
    assert boxes(FIXES["ignore"][0])[0]["iscrowd"] == 1
    assert boxes(FIXES["crowd as text"][0])[0]["iscrowd"] == 1
    for text in ("0", "false", False):
        assert boxes(first("annotations", ignore=text, iscrowd=text))[0]["iscrowd"] == 0
    assert [a["category_id"] for a in boxes(FIXES["categories of one name"][0])] == [0, 1]

    triangle = {"area": None, "segmentation": [[10, 10, 20, 10, 10, 30]]}
    data = load_coco(*write_coco(first("annotations", **triangle)))
    assert json.loads(open(data.json_file).read())["annotations"][0]["area"] == 100
    data = load_coco(*write_coco(first("annotations", area=None, segmentation=[])))
    assert json.loads(open(data.json_file).read())["annotations"][0]["area"] == 200
    assert [r["image_id"] for r in load_coco(*write_coco(first("images", id="1"))).records] == [
        1,
        2,
        3,
    ]
    mixed = load_coco(*write_coco(FIXES["one image id as text"][0]))
    assert [r["image_id"] for r in mixed.records] == ["2", "3", "a"]


def rle(x, y, w, h, compressed):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[y : y + h, x : x + w] = 1
    if compressed:
        code = mask_util.encode(mask)
        return {"size": code["size"], "counts": code["counts"].decode()}
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff(np.concatenate([[0], edges, [len(flat)]])).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def test_a_correct_json_is_read_as_detectron2_reads_it(write_coco):
    def change(data):
        a = data["annotations"]
        a[0].update(keypoints=[4, 5, 2, 6, 7, 1], num_keypoints=2)
        a[1].update(segmentation=rle(*a[1]["bbox"], compressed=False), iscrowd=1)
        a[2].update(segmentation=rle(*a[2]["bbox"], compressed=True))
        a[3].update(segmentation=[], bbox=[30, 13, 30.6, 24])  # within a pixel of the border
        data["images"].append(data["images"].pop(0))

    path, root = write_coco(change)
    data = load_coco(path, root)
    assert data.records == load_coco_json(path, root, "correct")
    assert (data.findings, data.fixed, data.json_file) == ([], False, path)
    assert (data.classes, data.category_ids) == (["ant", "bee"], [3, 7])
    assert data.records[0]["annotations"][0]["keypoints"] == [4.5, 5.5, 2, 6.5, 7.5, 1]


def test_flips_exchange_the_names_of_left_and_right_whatever_their_case(write_coco):
    given = ["nose", "Left_eye", "Right_eye", "LEFT_EAR", "RIGHT_EAR", "left_hip", "tail_left"]

    def change(data):
        for annotation in data["annotations"]:
            annotation.update(keypoints=[1, 1, 2] * len(given), num_keypoints=len(given))
        for category in data["categories"]:
            category.update(keypoints=given)

    assert load_coco(*write_coco(change)).keypoints == {
        "keypoint_names": given,
        "keypoint_flip_map": [("Left_eye", "Right_eye"), ("LEFT_EAR", "RIGHT_EAR")],
    }


def test_missing_area_and_box_of_an_rle_mask(write_coco):
    def change(data):
        a = data["annotations"][0]
        a.update(segmentation=rle(*a.pop("bbox"), compressed=False), area=None)

    data = load_coco(*write_coco(change))
    assert data.records[0]["annotations"][0]["bbox"] == [2, 3, 20, 10]
    assert json.loads(open(data.json_file).read())["annotations"][0]["area"] == 200
    assert perfect_ap(data) == (pytest.approx(100), pytest.approx(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "has no `images`: export it"),
        (lambda d: d.pop("categories"), "has no `categories`: export it"),
        (first("annotations", category_id=4), "no category 4, which annotation 1 names; its"),
        (first("images", id=2), "two images with id 2 (0.jpg and 1.jpg): renumber"),
        (first("images", id="2"), "two images with id 2 (0.jpg and 1.jpg): renumber"),
        (first("images", id=None), "no usable id in images[0] (0.jpg)"),
        (lambda d: d["images"][1].pop("file_name"), "no file_name in images[1]"),
        (each("images", lambda i: i.update(file_name="x" + i["file_name"])), "3 of the 3 images"),
        (first("images", width=120), "gives 0.jpg (id 1) the size 120x40, but the file has 60x40"),
        (first("categories", id=7), "two categories with id 7: renumber"),
        (first("categories", name=""), "a category without id or name"),
        (first("annotations", segmentation={"size": [60, 40], "counts": "abc"}), "[40, 60]"),
        (first("annotations", segmentation=[[1, 1, 9, 1, 9, None]]), "1 that is neither"),
        (first("annotations", segmentation=[{"size": 3}] * 2), "neither an RLE mask nor polygons"),
        (each("annotations", lambda a: a.update(bbox=[30, 20, 58, 38])), "6 boxes that reach out"),
        (each("annotations", lambda a: a.update(bbox=[0.1, 0.2, 0.3, 0.3])), "fractions of the"),
        (lambda d: d["annotations"].append(3), "of `annotations` that is not an object: 3"),
    ],
)  # fmt: skip
def test_what_cannot_be_fixed_is_refused(write_coco, change, message):
    path, root = write_coco(change)
    with pytest.raises(UserError) as error:
        load_coco(path, root)
    assert message in str(error.value) and path in str(error.value)


def test_files_that_are_no_jsons(tmp_path):
    with pytest.raises(UserError, match="no such file: nowhere.json.*DETECTRON2_DATASETS"):
        load_coco("nowhere.json", "images")
    path = tmp_path / "cut.json"
    for text, message in (
        ('{"images": [', "not a json, or not complete"),
        ("[]", "contains a list"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            load_coco(str(path), "images")


def test_images_without_annotations(write_coco):
    path, root = write_coco(lambda d: (d.pop("annotations"), d.pop("categories")))
    data = load_coco(path, root)
    assert (len(data.records), data.classes, data.fixed) == (3, [], False)
    assert set(data.records[0]) == {"file_name", "image_id", "width", "height"}


def turn(root, name):
    """Store an upright image of 60x40 as 40x60 pixels with an EXIF orientation of 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH)).save(os.path.join(root, name), exif=exif)


def test_sizes_before_the_exif_turn(write_coco, monkeypatch):
    path, root = write_coco(first("images", width=HEIGHT, height=WIDTH))
    turn(root, "0.jpg")
    data = load_coco(path, root)
    assert [f.count for f in data.findings if "EXIF orientation ignored" in f.what] == [1]
    assert (data.records[0]["width"], data.records[0]["height"]) == (WIDTH, HEIGHT)
    assert perfect_ap(data) == (pytest.approx(100), pytest.approx(100))

    def stored(d):  # a box that fits only into the stored pixels
        d["images"][0].update(width=HEIGHT, height=WIDTH)
        d["annotations"][0].update(bbox=[5, 30, 20, 28])

    path, root = write_coco(stored)
    turn(root, "0.jpg")
    with pytest.raises(UserError, match=r"stored pixels of 0.jpg \(annotation 1\)"):
        load_coco(path, root)


def test_sizes_are_compared_for_a_sample_and_where_boxes_do_not_fit(write_coco, monkeypatch):
    monkeypatch.setattr(coco_fixes, "SAMPLED_SIZES", 1)
    change = first("images", width=70)
    path, root = write_coco(lambda d: (d["images"].reverse(), d["images"][2].update(width=70)))
    assert load_coco(path, root).records[0]["width"] == 70  # only the first is compared
    with pytest.raises(UserError, match="gives 0.jpg .id 1. the size 70x40"):
        load_coco(path, root, all_sizes=True)
    path, root = write_coco(change)
    with pytest.raises(UserError, match="gives 0.jpg .id 1. the size 70x40"):
        load_coco(path, root)

    def box_beyond(d):
        d["images"].reverse()
        d["images"][2].update(width=HEIGHT, height=WIDTH)  # swapped; the second box does not fit

    data = load_coco(*write_coco(box_beyond))
    assert data.records[0]["width"] == WIDTH and data.all_sizes is False
    assert "swapped" in data.findings[0].what


def test_the_fixed_copy_is_written_once_and_used_again(write_coco, cache, monkeypatch):
    path, root = write_coco(FIXES["no size"][0])
    data = load_coco(path, root)
    assert not list(cache.glob("ann-*"))  # nothing is written before somebody needs it
    assert data.json_file == str(next(cache.glob("ann-*")))

    def never(*_):
        raise AssertionError

    monkeypatch.setattr(coco_json, "CocoFixer", never)
    again = load_coco(path, root)
    assert again.records == data.records and again.findings == data.findings
    assert again.json_file == data.json_file
    with pytest.raises(AssertionError):
        load_coco(path, root, all_sizes=True)  # more than what was compared then
    os.utime(path, (1, 1))
    with pytest.raises(AssertionError):
        load_coco(path, root)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/nowhere")
    monkeypatch.setattr(coco_json.tempfile, "gettempdir", lambda: str(cache.parent))
    assert load_coco(path, root).json_file.startswith(f"{cache.parent}/region_pretrain-")
