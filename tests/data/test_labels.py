"""Images with one class each: folders by class, and records with a class."""

import cv2
import numpy as np
import pytest

from region_pretrain.data.catalog import get_records, label_by_folder, register_image_folder
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry
from region_pretrain.errors import UserError
from region_pretrain.projects.soco import SoCoViews


@pytest.fixture
def views():
    return SoCoViews([16, 16], ["crop"], Photometry(), Photometry())


def write(path, value, shape=(40, 60, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.full(shape, value, np.uint8))


def test_classes_are_the_sorted_folders(tmp_path, views):
    for name, value in (("zebra/a.png", 10), ("ant/x/b.png", 20), ("ant/c.png", 30)):
        write(tmp_path / name, value)
    name = f"folder://{tmp_path}"
    data = PretrainDataset(name, views, labels=True)
    batch = data.batch(0, 0, [2, 0, 1])
    seen = {int(image.float().mean().round()): label for image, label in
            zip(batch.views[0].images, batch.labels.tolist(), strict=True)}  # fmt: skip
    assert seen == {10: 1, 20: 0, 30: 0}
    assert label_by_folder(get_records(name)) == ["ant", "zebra"]
    chunks = [chunk.labels.tolist() for chunk in batch.to("cpu").chunk(2)]
    assert sum(chunks, []) == batch.labels.tolist()
    assert PretrainDataset(name, views).batch(0, 0, [0]).labels is None


def test_the_label_is_that_of_the_replacing_image(tmp_path, views):
    write(tmp_path / "a/1.png", 50)
    write(tmp_path / "b/2.png", 90)
    data = PretrainDataset(f"folder://{tmp_path}", views, labels=True)
    (tmp_path / "a/1.png").write_bytes(b"broken")
    batch = data.batch(0, 0, [0])
    assert batch.labels.tolist() == [1] and (batch.views[0].images == 90).all()


def test_images_without_classes_are_refused(tmp_path, views, request):
    write(tmp_path / "a.png", 1)
    with pytest.raises(UserError, match="a.png has no label: it is not in a class folder"):
        PretrainDataset(f"folder://{tmp_path}", views, labels=True)
    name = register_image_folder(request.node.name, str(tmp_path))
    with pytest.raises(UserError, match="labels=True, but 1 of the 1 images have no class.*a.png"):
        PretrainDataset(name, views, labels=True)
