"""tools/check_data.py as a command line."""

import json

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from region_pretrain.commands.check_data import main


@pytest.fixture
def check(tmp_path, monkeypatch, capsys):
    """Run the tool; returns its exit code and what it printed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        code = main(list(arguments))
        return code, capsys.readouterr().out

    return run


@pytest.fixture
def names(tmp_path):
    """Two jsons over two images each; that of the first has no areas."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        Image.new("RGB", (30, 20), (60 * i, 0, 0)).save(tmp_path / f"images/{i}.png")
    for split, ids in (("train", (0, 1)), ("val", (2, 3))):
        box = {"category_id": 1, "bbox": [1, 2, 10, 10], "iscrowd": 0}
        area = {} if split == "train" else {"area": 100}
        data = {
            "images": [{"id": i, "file_name": f"{i}.png", "width": 30, "height": 20} for i in ids],
            "annotations": [{"id": i + 1, "image_id": i, **box, **area} for i in ids],
            "categories": [{"id": 1, "name": "thing"}],
        }
        (tmp_path / f"{split}.json").write_text(json.dumps(data))
    return [f"coco://{split}.json?images=images" for split in ("train", "val")]


def test_usable_data_exit_with_0(check, names):
    code, printed = check(*names, "--decode", "--workers", "1")
    assert code == 0
    assert printed.count("    thing          2         2") == 2
    assert "fixed: 2 x no area; computed from the mask or the box (e.g. annotation 1)" in printed
    assert "error" not in printed and "in common" not in printed


def test_data_sets_that_code_registers(check, names, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from detectron2.data.datasets import register_coco_instances\n"
        "register_coco_instances('checked_by_code', {}, 'val.json', 'images')\n"
    )
    try:
        code, printed = check("checked_by_code", "--register", str(tmp_path / "mine.py"))
    finally:
        DatasetCatalog.pop("checked_by_code", None), MetadataCatalog.pop("checked_by_code", None)
    assert code == 0 and "boxes: 2, " in printed


def test_what_stops_exits_with_1(check, names, tmp_path):
    (tmp_path / "images/0.png").write_text("")
    code, printed = check(names[0])
    assert code == 1 and "error: 1 unreadable files, e.g. " in printed
    code, printed = check("nowhere", names[1])
    assert code == 1 and "error: no data set is called 'nowhere'" in printed
    assert "boxes: 2, " in printed  # the other is inspected nevertheless
    text = (tmp_path / "val.json").read_text().replace("thing", "object")
    (tmp_path / "val.json").write_text(text)
    Image.new("RGB", (30, 20)).save(tmp_path / "images/0.png")
    code, printed = check(*names)
    assert code == 1 and "differ in their classes: only coco://train.json" in printed


def test_invalid_arguments(check, capsys):
    with pytest.raises(SystemExit) as exit_:
        check("folder://images", "--max-images", "0")
    assert exit_.value.code == 2
    assert capsys.readouterr().err == "error: --max-images 0: must be at least 1\n"
