"""The doctor's report, on files and labels with one fault each."""

import json

import cv2
import numpy as np
import pytest
import tifffile
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from region_pretrain.commands.check_data import main
from region_pretrain.data.coco_fixes import read_head
from region_pretrain.data.generated import register_scenes
from region_pretrain.data.inspection import compare, inspect
from region_pretrain.data.shapes import ShapesSpec
from region_pretrain.images import UnreadableImage, read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def images(tmp_path):
    """Three JPEGs of 60x40, 80x40 and 100x40."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(3):
        Image.new("RGB", (60 + 20 * i, 40), (80 * i, 0, 0)).save(folder / f"{i}.jpg")
    return folder


def coco(images, name="ann", change=lambda data: None):
    """The name of a data set: two boxes of "ant" in 0.jpg and one of "bee" in 1.jpg."""
    boxes = [(1, 1, [2, 3, 20, 10]), (1, 1, [30, 10, 20, 20]), (2, 2, [5, 5, 30, 30])]
    data = {
        "info": {},
        "images": [
            {"id": i + 1, "file_name": f"{i}.jpg", "width": 60 + 20 * i, "height": 40}
            for i in range(3)
        ],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": 9, "iscrowd": 0}
            for n, (i, c, box) in enumerate(boxes, 1)
        ],
        "categories": [{"id": i, "name": n} for i, n in enumerate(("ant", "bee", "cat"), 1)],
    }  # fmt: skip
    change(data)
    path = images.parent / f"{name}.json"
    path.write_text(json.dumps(data))
    return f"coco://{path}?images={images}"


def test_report_of_a_coco_json(images):
    name = coco(images, change=lambda d: [a.pop("area") for a in d["annotations"]])
    found = inspect(name, decode=True)
    assert "\n".join(line.rstrip() for line in found.lines()) == (f"""{name}
  images: 3; inspected: 3 JPEG
  width x height: smallest 60x40, median 80x40, largest 100x40
  boxes: 3, 0 with a mask; images without boxes: 1
  note: a mask head needs a mask for each box; use a faster_rcnn_* config
    class      boxes    images
    -------  -------  --------
    ant            2         1
    bee            1         1
    cat            0         0
  fixed: 3 x no area; computed from the mask or the box (e.g. annotation 1)
  note: 1 x category without boxes (e.g. id 3)""")
    assert found.problems == []


def test_folder(images):
    found = inspect(f"folder://{images}", max_images=2)
    assert list(found.lines())[1:] == [
        "  images: 3; inspected: 2 JPEG",
        "  width x height: smallest 60x40, median 70x40, largest 80x40",
    ]


def test_unreadable_files(images):
    noise = np.random.default_rng(0).integers(0, 256, (40, 80, 3)).astype(np.uint8)
    Image.fromarray(noise).save(images / "1.jpg")
    content = (images / "1.jpg").read_bytes()
    (images / "1.jpg").write_bytes(content[: len(content) // 2])
    (images / "2.jpg").write_text("no image")
    found = inspect(f"folder://{images}")
    assert len(found.problems) == 1
    assert (
        found.problems[0].startswith("1 unreadable files, e.g. ") and "2.jpg" in found.problems[0]
    )
    assert found.problems[0].endswith("repair or remove them")
    (problem,) = inspect(f"folder://{images}", decode=True).problems
    assert problem.startswith("2 unreadable files, e.g. ") and "1.jpg" in problem
    for i in range(200):
        Image.new("RGB", (8, 8)).save(images / f"more{i:03}.png")
    found = inspect(f"folder://{images}")
    assert found.problems == [] and found.formats == {"PNG": 200, "JPEG": 2}
    assert [(f.what, f.count) for f in found.findings] == [("unreadable file", 1)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "JPEG", "GIF", "WEBP"])
def test_files_that_were_cut_anywhere(images, kind):
    path = images / f"1.{kind.lower()}"
    Image.new("RGB", (8, 8)).save(path, kind)
    content = path.read_bytes()
    for length in range(min(len(content), 40)):
        path.write_bytes(content[:length])
        (problem,) = inspect(f"folder://{images}", decode=True).problems
        assert problem.startswith("1 unreadable files, e.g. ") and path.name in problem


def test_deep_and_multispectral_images(images):
    deep = np.full((4, 6, 3), 4095, np.uint16)
    cv2.imwrite(str(images / "deep.png"), deep)
    Image.fromarray(deep[..., 0]).save(images / "grey.tif")
    bands = np.zeros((4, 6, 5), np.uint8)
    tifffile.imwrite(images / "bands.tif", bands, photometric="rgb", planarconfig="contig")
    Image.new("RGBA", (6, 4)).save(images / "alpha.png")
    Image.new("RGBA", (6, 4)).save(images / "alpha.tif")
    found = inspect(f"folder://{images}")
    notes = {f.what: (f.count, f.example) for f in found.findings}
    (what,) = notes
    assert what.startswith("image of more than 8 bits") and "add bits=" in what
    assert notes[what] == (2, str(images / "deep.png"))
    bands = [p for p in found.problems if "bands" in p]
    assert len(bands) == 1 and bands[0].startswith("1 x image of 5 bands; choose three: add bands=")


@pytest.mark.parametrize("decode", [False, True])
def test_as_many_files_are_wrong_as_the_reading_refuses(tmp_path, decode):
    """BigTIFF, two alpha bands, CMYK, and transparency in formats that only Pillow reads."""
    for bands in range(1, 8):
        values = np.full((40, 60, bands), 999, np.uint16)
        colours = "rgb" if bands > 2 else "minisblack"
        extra = [2] * (bands - (3 if bands > 2 else 1))
        path = tmp_path / f"{bands}.tif"
        options = {"photometric": colours, "planarconfig": "contig", "extrasamples": extra}
        tifffile.imwrite(path, values if bands > 1 else values[..., 0], bigtiff=True, **options)
    Image.new("CMYK", (60, 40)).save(tmp_path / "cmyk.tif")
    Image.new("RGBA", (60, 40)).save(tmp_path / "alpha.webp", lossless=True)
    Image.new("P", (60, 40)).save(tmp_path / "palette.gif", transparency=0)
    refused = []
    for path in tmp_path.iterdir():
        try:
            read_image(str(path))
        except UnreadableImage:
            refused.append(path.name)
    assert sorted(refused) == ["5.tif", "6.tif", "7.tif"]
    found = inspect(f"folder://{tmp_path}", decode)
    assert [p.split(";")[0] for p in found.problems] == [
        f"1 x image of {n} bands" for n in (5, 6, 7)
    ]
    assert found.formats == {"TIFF": 8, "WEBP": 1, "GIF": 1}
    deep = [f.count for f in found.findings if "of more than 8 bits" in f.what]
    assert deep == [4] and found.sizes == [(60, 40)] * 7


def test_a_directory_that_is_longer_than_the_start_of_its_file(tmp_path):
    path = str(tmp_path / "rows.tif")
    values = np.zeros((40_000, 1, 5), np.uint16)
    options = {"photometric": "rgb", "planarconfig": "contig", "extrasamples": [0, 0]}
    tifffile.imwrite(path, values, bigtiff=True, rowsperstrip=1, **options)
    assert read_head(path, (1, 40_000)).header.bands == 5
    assert len(read_head(path, (1, 40_000)).data) > 1 << 18
    tifffile.imwrite(path, values, bigtiff=True, **options)
    head = read_head(path, (1, 40_000))
    assert (head.header.bands, head.header.bits, len(head.data)) == (5, 16, 1 << 18)


def test_sizes_that_contradict_the_files(images, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 60)).save(images / "0.jpg", exif=exif)
    monkeypatch.setattr("region_pretrain.data.coco_fixes.SAMPLED_SIZES", 1)

    def stored(data):  # 0.jpg is not sampled, and its boxes fit
        data["images"].reverse()
        data["images"][2].update(width=40, height=60)
        del data["annotations"][:2]

    found = inspect(coco(images, change=stored))
    assert found.problems == []
    assert [f.count for f in found.findings if "EXIF orientation ignored" in f.what] == [1]
    assert (found.records[0]["width"], found.records[0]["height"]) == (60, 40)

    name = "sizes of code"
    records = [{"file_name": str(images / "1.jpg"), "image_id": 1, "width": 70, "height": 40}]
    DatasetCatalog.register(name, lambda: records)
    try:
        (problem,) = inspect(name).problems
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name, None)
    assert (
        problem.startswith("1 x size that contradicts the file") and "70x40, file 80x40" in problem
    )


def test_labels_of_which_no_box_can_be_used(images, capsys):
    def text(*box):
        return lambda data: [a.update(bbox=list(map(str, box))) for a in data["annotations"]]

    (problem,) = inspect(coco(images, "words", text("a", 1, 9, 9))).problems
    assert "words.json has no usable box" in problem
    name = coco(images, "crowds", lambda d: [a.update(iscrowd=1) for a in d["annotations"]])
    assert main([name]) == 1 and "error: " in capsys.readouterr().out
    name = coco(images, "text", text(1.5, 1, 9, 9))
    assert main([name]) == 0 and "fixed: 3 x bbox as text; converted" in capsys.readouterr().out
    assert inspect(name).records[0]["annotations"][0]["bbox"] == [1.5, 1, 9, 9]
    for change in (lambda d: d.update(annotations=[]), lambda d: d.pop("annotations")):
        assert inspect(coco(images, "none", change)).problems == []  # nothing was annotated


def test_what_cannot_be_loaded(images):
    for name, message in (
        (coco(images, change=lambda d: d.pop("categories")), "has no `categories`"),
        ("nowhere", "no data set is called 'nowhere'"),
        ("ann.json", "write coco://ann.json?images=DIR"),
        ("coco://ann.json", "write coco://ANN.json?images=DIR"),
        (f"folder://{images}/none", "no such image folder"),
    ):
        found = inspect(name)
        assert len(found.problems) == 1 and message in found.problems[0]
        assert found.records == []


def test_registered_data_with_boxes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    name = register_scenes(ShapesSpec("val", 3, side=48), "inspected")
    try:
        found = inspect(name)
        assert found.problems == [] and len(found.classes) == 8
        assert sum(len(r["annotations"]) for r in found.records) > 3
        records = found.records
        records[0]["annotations"][0].update(bbox=[5, 5, 0, 4], bbox_mode=1)
        records[1]["annotations"][0].update(bbox=[5, 5, 70, 20], bbox_mode=0)
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, lambda: records)
        counts = {f.what: (f.count, f.example) for f in inspect(name).findings}
        assert counts["empty box"] == (1, records[0]["file_name"])
        assert counts["box that reaches out of its image"] == (1, records[1]["file_name"])
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def test_two_data_sets(images):
    a = inspect(coco(images, "a"))
    other = images.parent / "other"
    other.mkdir()
    (other / "copy.jpg").write_bytes((images / "1.jpg").read_bytes())
    Image.new("RGB", (80, 40), (80, 0, 1)).save(other / "new.jpg")

    def change(data):
        data["images"] = [
            {"id": 1, "file_name": "copy.jpg", "width": 80, "height": 40},
            {"id": 2, "file_name": "new.jpg", "width": 80, "height": 40},
        ]
        data["categories"][2]["name"] = "cow"

    b = inspect(coco(other, "b", change))
    notes, problems = compare(a, b)
    assert notes == [f"{a.name} and {b.name} have 1 images in common, e.g. {images / '1.jpg'}"]
    both = f"{a.name} and {b.name}"
    assert problems == [
        f"{both} differ in their classes: only {a.name} has cat; only {b.name} has cow"
    ]
    assert compare(a, a) == ([f"{a.name} and {a.name} have 3 images in common, e.g. "
                              f"{images / '0.jpg'}"], [])  # fmt: skip
    c = inspect(coco(images, "c", lambda d: d["categories"][0].update(id=9)
                     or d["annotations"].clear()))  # fmt: skip
    assert compare(a, c)[1] == [f"{a.name} and {c.name} differ in their classes: another order"]
    assert compare(a, inspect(f"folder://{other}"))[1] == []
