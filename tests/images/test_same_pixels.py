"""Every reader of a data set sees the pixels that its reading options define."""

import logging

import numpy as np
import pytest
import tifffile
from detectron2.config import LazyCall as L
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from omegaconf import OmegaConf
from PIL import Image

from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.photometry import Photometry
from region_pretrain.errors import UserError
from region_pretrain.evaluation.features import load_region
from region_pretrain.evaluation.knn_probe import KNNProbeHook
from region_pretrain.projects.mcl.objects import object_crops
from region_pretrain.projects.soco import SoCoViews
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.preview import draw_preview
from region_pretrain.regions.recipes import Found
from region_pretrain.reporting.pictures import first_records, ground_truth_pictures

READING = {"bits": 12}
GREY = 128  # 2048 of 4095


class EmptyRecipe:
    """Finds no region, and remembers the images."""

    id = "empty-v1"
    parameters: dict = {}

    def __init__(self):
        self.images = []

    def run(self, image, record, rng):
        self.images.append(image)
        return Found(np.zeros((0, 4), np.float32), given=0)


@pytest.fixture
def records(tmp_path):
    """Three images of 12 bits in 16, one grey value each."""
    found = []
    for i in range(3):
        path = str(tmp_path / f"{i}.tiff")
        Image.fromarray(np.full((48, 64), 2048, np.uint16)).save(path)
        box = {"bbox": [8, 8, 40, 32], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        record = {"file_name": path, "image_id": i, "height": 48, "width": 64}
        found.append({**record, "annotations": [box], "reading": READING})
    return found


@pytest.fixture
def name(records, request):
    name = f"{request.node.name}_deep"
    DatasetCatalog.register(name, lambda: records)
    MetadataCatalog.get(name).thing_classes = ["thing"]
    return name


@pytest.fixture
def views():
    return SoCoViews([16, 16], ["crop"], Photometry(), Photometry())


def test_region_search_and_preview(tmp_path, records):
    recipe = EmptyRecipe()
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, recipe, workers=1)
    assert [np.unique(image).tolist() for image in recipe.images] == [[GREY]] * 3
    draw_preview(records[:1], RegionStore.open(out), str(tmp_path / "p.png"), 1)
    with Image.open(tmp_path / "p.png") as picture:
        assert picture.convert("RGB").getpixel((200, 200)) == (GREY,) * 3


def test_pre_training(name, views):
    data = PretrainDataset(name, views)
    assert np.unique(data.sample(0, 0, 0).image).tolist() == [GREY]
    for view in data.batch(0, 0, [0, 1]).views:
        assert view.images.unique().tolist() == [GREY]


def test_objects_of_annotated_images(name, views):
    data = PretrainDataset(object_crops(name), views, labels=True)
    assert len(data) == 3 and np.unique(data.sample(0, 0, 0).image).tolist() == [GREY]


def test_probe(name):
    hook = KNNProbeHook(0, name)
    record, *_ = hook._read([name])
    image, boxes, classes = load_region(record, "BGR")
    assert image.unique().tolist() == [GREY] and image.shape == (3, 48, 64)
    assert boxes.tolist() == [[8, 8, 40, 32]] and classes == [0]


def test_pictures(name):
    test = {"dataset": L(records_of)(names=name)}
    cfg = OmegaConf.create({"dataloader": {"test": test}}, flags={"allow_objects": True})
    (picture,) = ground_truth_pictures(cfg, first_records(cfg, 1))
    assert picture[2, 2].tolist() == [GREY] * 3


def records_of(names):
    return DatasetCatalog.get(names)


def test_regions_found_with_other_options_are_not_mixed_silently(
    tmp_path, records, name, views, caplog
):
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, "grid-v1", workers=1)
    assert RegionStore.open(out).manifest["reading"] == "bits=12"
    caplog.set_level(logging.WARNING)
    PretrainDataset(name, views, out)
    assert not caplog.records
    for record in records:
        record["reading"] = {"bits": 11, "bands": [1]}
    PretrainDataset(name, views, out)
    assert "read with bits=12, but this run reads them with bits=11&bands=1" in caplog.text
    with pytest.raises(UserError, match="read with bits=12, not with bits=11&bands=1; delete it"):
        make_regions(records, out, "grid-v1", workers=1)
    for record in records:
        del record["reading"]
    with pytest.raises(UserError, match="read with bits=12, not with no options"):
        make_regions(records, out, "grid-v1", workers=1)


def test_too_many_bands_are_explained_in_every_summary(tmp_path, views, request):
    records = []
    for i in range(3):
        path = str(tmp_path / f"{i}.tiff")
        tifffile.imwrite(path, np.zeros((48, 64, 5), np.uint8), photometric="rgb")
        records.append({"file_name": path, "image_id": i})
    name = request.node.name
    DatasetCatalog.register(name, lambda: records)
    with pytest.raises(UserError, match=r"3 of 3 images cannot be read.*0\.tiff has 5 bands: ch"):
        make_regions(records, str(tmp_path / "r.arrow"), "grid-v1", workers=1)
    data = PretrainDataset(name, views)
    with pytest.raises(UserError, match="in a row are unreadable.*2.tiff has 5 bands: choose"):
        data.sample(0, 0, 0)
