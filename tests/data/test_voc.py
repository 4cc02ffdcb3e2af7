"""Pascal VOC's layout as labelling tools write it."""

import pytest
from voc_files import make_voc

from region_pretrain.config import get_config
from region_pretrain.data import sources
from region_pretrain.data.catalog import get_records
from region_pretrain.data.inspection import inspect, prepare_labels
from region_pretrain.errors import UserError


def rename(root, old, new):
    """Another name for an image."""
    (root / f"Annotations/{old}.xml").rename(root / f"Annotations/{new}.xml")
    (root / f"JPEGImages/{old}.jpg").rename(root / f"JPEGImages/{new}.jpg")


def files(name):
    return [record["file_name"].rpartition("/")[2] for record in get_records(name)]


@pytest.fixture
def voc(tmp_path):
    """Folder and name of a data set of three images."""
    root = make_voc(tmp_path / "mine", ["person", "car"], {"train": [0, 1, 2]})
    return root, f"voc://{root}?split=train"


def test_names_with_spaces_and_signs(voc):
    root, name = voc
    names = ["a b", "c#1", "photo 1"]
    for i, new in enumerate(names):
        rename(root, f"{i:06d}", new)
    (root / "ImageSets/Main/train.txt").write_text("\n".join(names))
    records = get_records(name)
    assert [record["image_id"] for record in records] == names
    assert files(name) == ["a b.jpg", "c#1.jpg", "photo 1.jpg"]
    assert inspect(name).problems == []
    with pytest.raises(UserError, match="VOC's metric cannot read 'a b'.*rename.*COCOEvaluator"):
        prepare_labels(get_config("detection/faster_rcnn_r50_c4_voc.py"), {"test": [name]})


def test_a_list_of_one_image(voc):
    root, name = voc
    (root / "ImageSets/Main/train.txt").write_text("000001\n")
    assert files(name) == ["000001.jpg"]


@pytest.mark.parametrize("column", [" -1", "  1", "\t0"])
def test_lists_of_one_class_are_refused(voc, column):
    root, name = voc
    (root / "ImageSets/Main/train.txt").write_text(f"000000\n\n000001{column}\n")
    with pytest.raises(UserError, match=r"train\.txt: line 3 .*has a second column.*keep only"):
        get_records(name)


def test_images_with_another_ending(voc):
    root, name = voc
    images, xml = root / "JPEGImages", root / "Annotations/000002.xml"
    for i, new in enumerate(("000000.JPG", "000001.png", "IMG_7.jpeg")):
        (images / f"{i:06d}.jpg").rename(images / new)
    (images / "000001.txt").touch()
    xml.write_text(
        xml.read_text().replace("<size>", "<filename>D:\\x\\IMG_7.jpeg</filename><size>")
    )
    assert files(name) == ["000000.JPG", "000001.png", "IMG_7.jpeg"]
    assert inspect(name).problems == []


def test_the_name_in_the_xml_decides_only_between_other_endings(voc):
    root, name = voc
    images = root / "JPEGImages"
    for i in range(2):
        xml = root / f"Annotations/{i:06d}.xml"
        given = f"<filename>{i:06d}.png</filename><size>"
        xml.write_text(xml.read_text().replace("<size>", given))
        for ending in ("bmp", "png"):
            (images / f"{i:06d}.{ending}").write_bytes((images / f"{i:06d}.jpg").read_bytes())
    (images / "000001.jpg").unlink()
    (images / "000002.jpg").unlink()  # missing: reported when the files are checked
    assert files(name) == ["000000.jpg", "000001.png", "000002.jpg"]


def test_boxes_that_are_not_trained_on_are_warned_of(voc, caplog):
    root, name = voc
    sources.register(name)
    for i, (xmin, xmax) in enumerate([(30, 9), (90, 99), (1, 99)]):
        path = root / f"Annotations/{i:06d}.xml"
        box = f"<xmin>{xmin}</xmin><ymin>2</ymin><xmax>{xmax}</xmax><ymax>9</ymax>"
        head, _, rest = path.read_text().partition("<xmin>")
        path.write_text(head + box + rest.partition("</ymax>")[2])
    prepare_labels(get_config("detection/faster_rcnn_r50_c4_voc.py"), {"train": [name]})
    for i, what in enumerate(["empty box", "box outside of its image", "box that reaches out"]):
        (found,) = [line for line in caplog.messages if f"1 x {what}" in line]
        assert found.startswith(name) and f"{i:06d}.jpg" in found
    notes = [finding.what for finding in inspect(name).findings]
    assert len(notes) == 3
