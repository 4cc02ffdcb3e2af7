"""One file of boxes in each format, with the same boxes."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore
from region_pretrain.regions.elsewhere import FileRecipe, attach, load_boxes
from region_pretrain.regions.elsewhere.json_boxes import read_masks
from region_pretrain.regions.elsewhere.label_maps import label_boxes, read_label_map
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.recipes import change

#: File name -> boxes XYXY, best first, of images of 90 pixels' height and 100 or more's width.
BOXES = {
    "00.png": [[10, 20, 40, 60], [0, 0, 100, 90], [5.5, 6, 7, 8.25]],
    "03.png": [[1, 2, 3, 4]],
}
SCORES = {"00.png": [0.875, 0.5, 0.25], "03.png": [0.75]}


def xywh(box):
    x0, y0, x1, y1 = box
    return [x0, y0, x1 - x0, y1 - y0]


def entries(image):
    """``image(file name)`` -> keys of an entry. The worst box comes first."""
    return [
        {**image(name), "bbox": xywh(box), "score": score, "category_id": 3}
        for name in BOXES
        for box, score in reversed(list(zip(BOXES[name], SCORES[name], strict=True)))
    ]


def coco_results(folder: Path) -> Path:
    return dump(folder / "results.json", entries(lambda name: {"file_name": name}))


def coco_annotations(folder: Path) -> Path:
    """Ids of its own; a crowd, which does not count; images last."""
    ids = {name: i for i, name in enumerate(BOXES, 7)}
    crowd = {"image_id": 7, "bbox": [50, 50, 9, 9], "iscrowd": 1, "score": 1}
    content = {
        "info": {"a": [1]},
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [crowd, *entries(lambda name: {"image_id": ids[name]})],
        "images": [
            {"id": i, "file_name": name, "width": 100 + 5 * int(name[:2]), "height": 90}
            for name, i in ids.items()
        ],
    }
    return dump(folder / "annotations.json", content)


def masks_by_image(folder: Path) -> Path:
    content = {
        name: [
            {"bbox": xywh(box), "predicted_iou": score, "stability_score": 1, "area": 5}
            for box, score in zip(BOXES[name], SCORES[name], strict=True)
        ]
        for name in BOXES
    }
    return dump(folder / "masks.json", content)


def mask_folder(folder: Path) -> Path:
    """A list, and SA-1B's form."""
    masks = json.loads(masks_by_image(folder).read_text())
    (folder / "masks/images").mkdir(parents=True)
    dump(folder / "masks/00.json", masks["00.png"])
    image = {"image_id": 5, "width": 115, "height": 90, "file_name": "03.png"}
    dump(folder / "masks/images/03.json", {"image": image, "annotations": masks["03.png"]})
    return folder / "masks"


def proposals(folder: Path, mode=BoxMode.XYXY_ABS, ids=("im/0", "im/3")) -> Path:
    convert = xywh if mode == BoxMode.XYWH_ABS else list
    content = {
        "ids": list(ids),
        "boxes": [np.array([convert(box) for box in some], np.float32) for some in BOXES.values()],
        "objectness_logits": [np.log(np.array(s) / (1 - np.array(s))) for s in SCORES.values()],
        "bbox_mode": mode,
    }
    path = folder / "proposals.pkl"
    path.write_bytes(pickle.dumps(content))
    return path


def old_proposals(folder: Path) -> Path:
    """Detectron1's names, in the protocol of Python 2, with the boxes as x, y, width, height."""
    content = {
        "indexes": np.array(["im/0", "im/3"]).tolist(),
        "boxes": [np.array(list(map(xywh, some))) for some in BOXES.values()],
        "scores": [np.array(some) for some in SCORES.values()],
        "bbox_mode": 1,
    }
    path = folder / "old.pkl"
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def csv_file(folder: Path) -> Path:
    lines = [
        f"{score},note,{name},{','.join(map(str, box))}"
        for name in BOXES
        for box, score in reversed(list(zip(BOXES[name], SCORES[name], strict=True)))
    ]
    path = folder / "boxes.csv"
    path.write_text("\ufeffscore,extra,file_name,x0,y0,x1,y1\n" + "\n".join(lines) + "\n")
    return path


def dump(path: Path, content) -> Path:
    path.write_text(json.dumps(content))
    return path


def regions_of(records, path, out, **changes) -> dict[str, list]:
    """Make the store, and return the boxes by file name."""
    boxes = load_boxes(str(path))
    recipe = change(FileRecipe("file-v1", source=boxes.digest), changes)
    make_regions(attach(records, boxes), str(out), recipe, workers=1)
    store = RegionStore.open(str(out))
    assert len(store) == len(records)
    assert store.manifest["recipe"] == recipe.id
    return {
        os.path.basename(r["file_name"]): store.boxes(r["image_id"]).tolist()
        for r in records
        if len(store.boxes(r["image_id"]))
    }


ALL = [
    coco_results, coco_annotations, masks_by_image, mask_folder, proposals, old_proposals, csv_file,
]  # fmt: skip


@pytest.mark.parametrize("write", ALL)
def test_boxes_are_exact_and_ordered_by_score(write, tmp_path, records):
    assert regions_of(records, write(tmp_path), tmp_path / "r.arrow") == BOXES


def test_label_maps(tmp_path, records):
    """Grey, palette, 16 bits and COCO's panoptic colours; two parts of a label are one region."""
    folder = tmp_path / "maps"
    folder.mkdir()
    labels = np.zeros((90, 100), np.uint8)
    labels[20:60, 10:40] = 7
    labels[3:5, 3:5] = labels[80:90, 98:100] = 9
    Image.fromarray(labels).save(folder / "00.png")
    palette = Image.fromarray(np.pad(labels, ((0, 0), (0, 5)))).convert("P")
    palette.putdata(np.pad(labels, ((0, 0), (0, 5))).ravel().tolist())
    palette.save(folder / "01.png")
    deep = np.pad(labels, ((0, 0), (0, 10))).astype(np.uint16) * 1000
    Image.fromarray(deep).save(folder / "02.png")
    colours = np.zeros((90, 115, 3), np.uint8)
    colours[20:60, 10:40] = (0, 0, 1)
    colours[0:2, 0:3] = (0, 1, 0)
    Image.fromarray(colours).save(folder / "03.png")
    boxes = [[3, 3, 100, 90], [10, 20, 40, 60]]
    found = regions_of(records, folder, tmp_path / "r.arrow")
    assert {name: sorted(some) for name, some in found.items()} == {
        **dict.fromkeys(["00.png", "01.png", "02.png"], boxes),
        "03.png": [[0, 0, 3, 2], [10, 20, 40, 60]],
    }
    found = regions_of(records, folder, tmp_path / "zero.arrow", with_zero=1)
    assert sorted(found["00.png"]) == [[0, 0, 100, 90], *boxes]


@given(st.lists(st.integers(0, 3), min_size=20, max_size=20))
def test_label_boxes_are_those_of_a_slow_search(values):
    labels = np.array(values).reshape(4, 5)
    slow = []
    for label in sorted({*values} - {0}):
        y, x = np.nonzero(labels == label)
        slow.append([min(x), min(y), max(x) + 1, max(y) + 1])
    assert label_boxes(labels).tolist() == slow


def test_ids_of_a_folders_images_are_resolved_by_a_json(tmp_path, records):
    path = dump(tmp_path / "r.json", entries(lambda name: {"image_id": 7 if name[1] == "0" else 8}))
    with pytest.raises(UserError, match=r"none of the 11 images: its image ids, e.g. 7.*--ids"):
        attach(records, load_boxes(str(path)))
    listing = coco_annotations(tmp_path)
    boxes = load_boxes(str(path), ids=str(listing))
    assert boxes.table.names == ["00.png", "03.png"] and not boxes.table.by_id
    assert boxes.digest != load_boxes(str(path)).digest
    dump(listing, {"images": [{"id": 99, "file_name": "x.png"}]})
    with pytest.raises(UserError, match=r"r.json is not a file of the images in .*e.g. 7"):
        load_boxes(str(path), ids=str(listing))


def test_the_digest_is_the_beginning_of_sha256sum(tmp_path):
    path = csv_file(tmp_path)
    done = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
    assert load_boxes(str(path)).digest == done.stdout[:16]
    folder = mask_folder(tmp_path)
    before = load_boxes(str(folder)).digest
    dump(folder / "00.json", [])
    assert load_boxes(str(folder)).digest != before


def test_images_without_boxes_are_kept_apart_from_strange_ones(tmp_path, records, caplog):
    caplog.set_level("INFO")
    more = [{"file_name": "strange.png", "bbox": [1, 2, 3, 4], "score": 1}]
    path = dump(tmp_path / "r.json", entries(lambda name: {"file_name": name}) + more)
    boxes = load_boxes(str(path))
    recipe = FileRecipe("file-v1", source=boxes.digest)
    summary = make_regions(attach(records, boxes), str(tmp_path / "r.arrow"), recipe, workers=1)
    assert (summary["images"], summary["boxes"], summary["without"]) == (11, 4, 9)
    assert f"{path} (coco): boxes for 2 of 11 images" in caplog.text
    assert f"has no boxes for 9 images (e.g. {records[1]['file_name']}, " in caplog.text
    assert "also has boxes for 1 images (e.g. strange.png) that the data set lacks" in caplog.text


class Malicious:
    def __reduce__(self):
        return (open, ("pwned", "w"))


FAULTS = {
    "empty.json": ("", "none of the known formats"),
    "text.txt": ("hello\n", "none of the known formats"),
    "header.csv": ("name,x0,y0,x1,y1\na,1,2,3,4\n", "its header must be file_name"),
    "value.csv": ("file_name,x0,y0,x1,y1\na,1,2,x,4\n", "x"),
    "columns.csv": ("file_name,x0,y0,x1,y1\na,1,2\n", "Expected 5 columns"),
    "noname.csv": ("file_name,x0,y0,x1,y1\n,1,2,3,4\n", "a line has no file_name"),
    "cut.json": ('[{"image_id": 1, "bbox": [1, 2', "at character 31"),
    "after.json": ("[] x", "text after its end at character 3"),
    "comma.json": ('[{"image_id": 1, "bbox": [1, 2, 3, 4]} 5]', "expected , or ], found '5'"),
    "box.json": ('[{"image_id": 1, "bbox": [1, 2, 3]}]', "entry 0: bbox [1, 2, 3] is not a list"),
    "text.json": ('[{"image_id": 1, "bbox": [1, 2, 3, "x"]}]', "entry 0: must be real number"),
    "huge.json": ('[{"image_id": 1, "bbox": [1, 2, 3, 1%s]}]' % ("0" * 400), "entry 0: int too"),
    "nobox.json": ('[{"image_id": 1}]', "entry 0 has no bbox"),
    "noid.json": ('[{"bbox": [1, 2, 3, 4]}]', "entry 0 has no image_id"),
    "id.json": ('[{"image_id": 1.5, "bbox": [1, 2, 3, 4]}]', "'1.5' is neither an id nor"),
    "number.json": ("[3]", "entry 0"),
    "deep.json": ("[" * 100_000, "RecursionError"),
    "scores.json": (
        '[{"image_id": 1, "bbox": [1, 2, 3, 4]}, {"image_id": 1, "bbox": [1, 2, 3, 4], '
        '"score": 1}]',
        "entry 1: some boxes have a score and others have none",
    ),
    "relative.json": ('[{"image_id": 1, "bbox": [0.1, 0.2, 0.3, 0.4]}]', "are fractions of"),
    # The right side is at 1.00000003.
    "rounded.json": ('[{"image_id": 1, "bbox": [0.60000003, 0.1, 0.4, 0.5]}]', "are fractions of"),
    "images.json": ('{"images": []}', "it has images, but no annotations"),
    "nothing.json": ('{"info": {}}', "neither annotations nor lists of boxes"),
    "mask.json": ('{"a.png": [{"area": 3}]}', "image 'a.png': entry 0 has no bbox"),
    "latin1.json": (b'[{"file_name": "\xe9"}]', "UnicodeDecodeError"),
    "garbage.pkl": (b"\x80\x04garbage", "is not a file of Detectron2's proposals"),
    "list.pkl": (pickle.dumps([1]), "it contains a list instead of a dict"),
    "keys.pkl": (pickle.dumps({"boxes": []}), "it lacks ids, objectness_logits"),
    "code.pkl": (pickle.dumps({"ids": Malicious()}), "io.open: only NumPy arrays"),
    "shape.pkl": (
        pickle.dumps({"ids": [1], "boxes": [np.zeros(4)], "scores": [np.zeros(1)]}),
        "image 1 has something else than numbers",
    ),
    "count.pkl": (
        pickle.dumps({"ids": [1], "boxes": [np.zeros((1, 4))], "scores": [np.zeros(2)]}),
        "image 1 has another number of boxes than of scores",
    ),
    "object.pkl": (
        pickle.dumps({"ids": [1], "boxes": [np.array([[None] * 4])], "scores": [np.zeros(1)]}),
        "image 1 has something else than numbers",
    ),
    "mode.pkl": (
        pickle.dumps({"ids": [], "boxes": [], "scores": [], "bbox_mode": 2}),
        "its bbox_mode is XYXY_REL",
    ),
    "twice.pkl": (
        pickle.dumps({"ids": [1, "1"], "boxes": [[], []], "scores": [[], []]}),
        "an id appears twice",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_malformed_files_are_refused_in_one_line(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, message = FAULTS[name]
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        load_boxes(str(path))
    assert str(error.value).startswith(str(path)) and message in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("write", [f for f in ALL if f not in (mask_folder, old_proposals)])
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damaged_bytes_raise_only_user_errors(write, tmp_path, data):
    path = write(tmp_path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / "damaged"
    damaged.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        boxes = load_boxes(str(damaged))
    except UserError as error:
        assert str(damaged) in str(error) and len(str(error).splitlines()) == 1
    else:
        assert boxes.table.boxes.shape == (boxes.table.offsets[-1], 4)


def test_label_maps_may_be_as_large_as_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # Pillow's own limit
    labels = np.zeros((100, 200), np.uint8)
    labels[20:30, 50:90] = 7
    Image.fromarray(labels).save(tmp_path / "a.png")
    assert read_label_map(str(tmp_path / "a.png")).boxes.tolist() == [[50, 20, 90, 30]]
    monkeypatch.setenv("REGION_PRETRAIN_MAX_PIXELS", "10000")
    with pytest.raises(UserError, match="200x100 pixels, more than the limit of 10000"):
        read_label_map(str(tmp_path / "a.png"))


def test_damaged_masks_and_label_maps_are_named(tmp_path, records):
    for ending, content in ((".json", b'[{"bbox": 3}]'), (".png", b"no png")):
        folder = tmp_path / f"folder{ending}"
        folder.mkdir()
        (folder / f"00{ending}").write_bytes(content)
        with pytest.raises(UserError, match=f"folder{ending}/00{ending} is not a .*: "):
            regions_of(records, folder, tmp_path / f"r{ending}.arrow")
    rgba = tmp_path / "folder.png/00.png"
    Image.new("RGBA", (100, 90)).save(rgba)
    with pytest.raises(UserError, match="its pixels are RGBA"):
        regions_of(records, rgba.parent, tmp_path / "r2.arrow")
    noise = np.random.default_rng(0).integers(0, 256, (90, 100, 3), np.uint8)
    Image.fromarray(noise).save(rgba)
    with pytest.raises(UserError, match="labels, like a photograph"):
        regions_of(records, rgba.parent, tmp_path / "r3.arrow")
    Image.new("L", (90, 100)).save(rgba)
    with pytest.raises(UserError, match="is 100x90, but its annotations are for 90x100"):
        regions_of(records, rgba.parent, tmp_path / "r4.arrow")


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ([], {}, "no such file or folder"),
        (["a.txt"], {}, "has no .json or .png files"),
        (["a.json", "b.png"], {}, "give --format masks or label-maps"),
        (["a.json"], {"format": "label-maps"}, "has no .png files"),
        (["a.json"], {"format": "csv"}, "--format csv is that of a file"),
        (["a.json"], {"format": "yolo"}, "--format yolo: must be one of coco, detectron2, csv"),
        (["a.json"], {"ids": "x"}, "--ids is for a file with image ids"),
    ],
)
def test_folders(tmp_path, content, options, message):
    for name in content:
        (tmp_path / "boxes").mkdir(exist_ok=True)
        (tmp_path / "boxes" / name).touch()
    with pytest.raises(UserError, match=message):
        load_boxes(str(tmp_path / "boxes"), **options)


def test_masks_of_one_image_may_be_empty(tmp_path):
    table = read_masks(str(dump(tmp_path / "a.json", [])))
    assert table.boxes.shape == (0, 4) and table.names == [""]


def test_a_hundred_thousand_boxes_take_little_memory(tmp_path):
    """5 MB of boxes in a file of 9 MB; a list of dicts would occupy 60 MB."""
    code = (
        "import resource, sys; from region_pretrain.regions.elsewhere import load_boxes\n"
        "load_boxes(sys.argv[2]); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "table = load_boxes(sys.argv[1]).table\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(table.boxes), (after - before) // 1024)"
    )
    many = [
        {"image_id": i // 50, "category_id": 1, "bbox": [i % 97, 2.25, 30.5, 40], "score": 0.5}
        for i in range(100_000)
    ]
    paths = [dump(tmp_path / "many.json", many), dump(tmp_path / "few.json", many[:1000])]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, paths)], capture_output=True, text=True, check=True
    )
    count, megabytes = map(int, done.stdout.split())
    assert count == 100_000 and megabytes < 35
