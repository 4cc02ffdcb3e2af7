"""A small COCO json that tests change."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # where tests find ``empty_files``

WIDTH, HEIGHT = 60, 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "region_pretrain"


def rectangle(x, y, w, h):
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def write_coco(tmp_path):
    """Write three images of 60x40 and a json of six boxes of two classes, changed by a function."""

    def write_coco(change=lambda data: None):
        root = tmp_path / "images"
        root.mkdir(exist_ok=True)
        images, annotations = [], []
        for i in range(3):
            Image.new("RGB", (WIDTH, HEIGHT), (i * 80, 0, 0)).save(root / f"{i}.jpg")
            images.append({"id": i + 1, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
            for j, box in enumerate(([2 + i, 3, 20, 10], [30, 12 + i, 24, 25 - i])):
                annotations.append(
                    {
                        "id": len(annotations) + 1, "image_id": i + 1, "category_id": 3 + 4 * j,
                        "bbox": box, "area": box[2] * box[3], "iscrowd": 0,
                        "segmentation": rectangle(*box),
                    }
                )  # fmt: skip
        categories = [{"id": 3, "name": "ant"}, {"id": 7, "name": "bee"}]
        data = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
        change(data)
        path = tmp_path / "ann.json"
        path.write_text(json.dumps(data))
        return str(path), str(root)

    return write_coco
