"""Labelled data by path equals what Detectron2's own registration functions load."""

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog, get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json, register_coco_instances, register_pascal_voc
from detectron2.data.datasets.pascal_voc import CLASS_NAMES
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.structures import Boxes, BoxMode, Instances
from omegaconf import OmegaConf
from voc_files import make_voc

from region_pretrain.config import get_config
from region_pretrain.data import sources
from region_pretrain.data.catalog import check_registered, get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.few_label import first_fraction, random_fraction
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.data.sources import register, register_named
from region_pretrain.errors import UserError
from region_pretrain.evaluation.knn_probe import KNNProbeHook
from region_pretrain.projects.mcl.objects import object_crops


def coco_name(folder: Path, options: str = "") -> str:
    return f"coco://{folder}/ann.json?images={folder}/images{options}"


def change(folder: Path, edit) -> None:
    data = json.loads((folder / "ann.json").read_text())
    edit(data)
    (folder / "ann.json").write_text(json.dumps(data))


def noisy_outputs(records: list[dict]) -> list[dict]:
    """Detections near the boxes, of which some have a wrong class."""
    rng = np.random.default_rng(0)
    outputs = []
    for record in records:
        instances = Instances((record["height"], record["width"]))
        boxes = [
            BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS)
            for a in record["annotations"]
        ]
        instances.pred_boxes = Boxes(torch.tensor(boxes) + torch.tensor(rng.normal(0, 1.5, 4)))
        instances.scores = torch.tensor(rng.uniform(0.5, 1, len(boxes)))
        classes = [(a["category_id"] + (rng.random() < 0.2)) % 3 for a in record["annotations"]]
        instances.pred_classes = torch.tensor(classes)
        outputs.append({"instances": instances})
    return outputs


def results(evaluator, records: list[dict]) -> dict:
    evaluator.reset()
    evaluator.process(records, noisy_outputs(records))
    return evaluator.evaluate()


@pytest.fixture
def stock(request):
    """A name for Detectron2's own registration."""
    name = f"stock_{request.node.name}"
    yield name
    DatasetCatalog.data.pop(name, None)
    MetadataCatalog.pop(name, None)


def test_coco_equals_detectron2s_own(coco_folder, stock):
    name = coco_name(coco_folder)
    files = str(coco_folder / "ann.json"), str(coco_folder / "images")
    register_coco_instances(stock, {}, *files)
    expected = DatasetCatalog.get(stock)
    register(name)
    assert get_records(name) == DatasetCatalog.get(name) == expected == load_coco_json(*files, "x")
    metadata, theirs = MetadataCatalog.get(name), MetadataCatalog.get(stock)
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id", "json_file", "image_root"):
        assert getattr(metadata, key) == getattr(theirs, key), key
    assert metadata.thing_classes == ["dog", "ant", "cat"]
    assert metadata.evaluator_type == "coco"
    mine = results(COCOEvaluator(name), expected)["bbox"]
    theirs = results(COCOEvaluator(stock), expected)["bbox"]
    np.testing.assert_equal(mine, theirs)  # NaN: no large boxes
    assert 20 < mine["AP"] < 95


def test_names_work_wherever_a_data_set_is_named(coco_folder):
    name = coco_name(coco_folder)
    assert len(first_fraction(name, 0.5)) == 3
    assert len(random_fraction([name], 0.5, seed=0, filter_empty=False)) == 3
    probe = KNNProbeHook(0, name)
    assert [len(probe._read(names)) for names in probe._names if names] == [6]
    crops = get_records(object_crops(name))
    assert len(crops) == 12 and {c["category_id"] for c in crops} == {0, 1, 2}
    assert MetadataCatalog.get(object_crops(name)).thing_classes == ["dog", "ant", "cat"]
    for wrong in (f"cocoo://{coco_folder}", "coco://x.json", f"voc://{coco_folder}"):
        for use in (get_records, check_registered, lambda n: first_fraction(n, 1), object_crops):
            with pytest.raises(UserError, match=re.escape(wrong)):
                get_records(use(wrong))


def test_every_name_in_a_config_is_registered_and_nothing_is_read(coco_folder):
    name = coco_name(coco_folder, "&bits=9")
    folder, voc = f"folder://{coco_folder}/images?bits=9", f"voc://{coco_folder}/absent?split=val"
    cfg = OmegaConf.create({"train": {"register": []}, "a": [name, {"b": folder}], "c": voc})
    register_named(cfg)
    register_named(cfg)
    assert {name, folder, voc} <= set(DatasetCatalog)
    assert len(get_detection_dataset_dicts(name)) == 6
    assert len(get_detection_dataset_dicts([folder])) == 6
    assert MetadataCatalog.get(folder).image_root == f"{coco_folder}/images"


def test_a_json_is_read_once_and_each_caller_has_records_of_its_own(coco_folder, monkeypatch):
    calls = []
    load = sources.load_coco
    monkeypatch.setattr(sources, "load_coco", lambda *args: calls.append(args) or load(*args))
    name = coco_name(coco_folder)
    first = get_records(name)
    first[0]["annotations"].clear()
    assert len(get_records(name)[0]["annotations"]) == 2
    assert get_records(name) == DatasetCatalog.get(name)
    assert calls == [(f"{coco_folder}/ann.json", f"{coco_folder}/images")]


def test_reading_options_are_in_every_record(coco_folder):
    plain, options = coco_name(coco_folder), coco_name(coco_folder, "&bits=12&bands=4,3,2")
    reading = {"bits": 12, "bands": [4, 3, 2]}
    for annotations in (True, False):
        expected = [{**r, "reading": reading} for r in get_records(plain, annotations)]
        assert get_records(options, annotations) == expected
        assert not any("reading" in r for r in get_records(plain, annotations))
    record, *_ = get_records(f"folder://{coco_folder}/images?bits=10")
    assert record["reading"] == {"bits": 10}
    assert all(r["reading"] == reading for r in get_records(object_crops(options)))


def test_pretraining_needs_only_file_names(coco_folder, soco_views):
    def edit(data):
        del data["annotations"], data["categories"]
        for image in data["images"][1:]:
            del image["width"], image["height"]

    change(coco_folder, edit)
    records = get_records(coco_name(coco_folder), annotations=False)
    assert [r["image_id"] for r in records] == [2, 8, 9, 30, 77, 581]
    assert records[3] == {
        "file_name": f"{coco_folder}/images/30.png",
        "image_id": 30,
        "height": 64,
        "width": 64,
    }
    assert records[0] == {"file_name": f"{coco_folder}/images/2.png", "image_id": 2}
    dataset = PretrainDataset(coco_name(coco_folder), soco_views)
    for i in range(6):
        expected = cv2.imread(records[i]["file_name"])[..., ::-1]
        np.testing.assert_array_equal(dataset.sample(0, 0, i).image, expected)
    labelled = get_records(coco_name(coco_folder))  # sizes are read from the files
    assert {(r["height"], r["width"]) for r in labelled} == {(64, 64)}
    assert not any("annotations" in r for r in labelled)


def test_pretraining_accepts_ids_of_two_types(coco_folder):
    def edit(data):
        data["images"][1]["id"] = "img_9"

    change(coco_folder, edit)
    records = get_records(coco_name(coco_folder), annotations=False)
    assert [r["image_id"] for r in records] == [2, 8, 30, 77, 581, "img_9"]


def test_paths_with_special_characters(coco_folder, tmp_path, monkeypatch):
    root = coco_folder.rename(tmp_path / "é b=1?&%3F")
    monkeypatch.setenv("HOME", str(tmp_path))
    quoted = str(root).replace("%", "%25").replace("?", "%3F").replace("&", "%26")
    expected = load_coco_json(f"{root}/ann.json", f"{root}/images", "y")
    assert get_records(f"coco://{quoted}/ann.json?images={quoted}/images") == expected
    root.rename(tmp_path / "c d")
    name = "coco://~/c d/ann.json?images=~/c d/images"
    assert [r["file_name"] for r in get_records(name)] == [
        r["file_name"].replace(root.name, "c d") for r in expected
    ]


@pytest.mark.parametrize(("folder", "year"), [("VOC2007", 2007), ("VOC2012", 2012)])
def test_voc_ap_by_name_is_that_of_the_registered_data_set(tmp_path, stock, folder, year):
    names = ["aeroplane", "bicycle", "bird"]
    root = make_voc(tmp_path / folder, names, {"val": list(range(8)), "train": [8, 9]})
    name = f"voc://{root}?split=val"
    register_pascal_voc(stock, str(root), "val", year)
    expected = DatasetCatalog.get(stock)
    assert get_records(name) == expected and len(expected) == 8
    metadata = MetadataCatalog.get(name)
    assert (metadata.thing_classes, metadata.year) == (list(CLASS_NAMES), year)
    assert (metadata.dirname, metadata.split) == (str(root), "val")
    mine = results(PascalVOCDetectionEvaluator(name), expected)["bbox"]
    theirs = results(PascalVOCDetectionEvaluator(stock), expected)["bbox"]
    np.testing.assert_equal(mine, theirs)  # NaN: classes without boxes
    cfg = get_config("detection/faster_rcnn_r50_fpn_4conv1fc.py")
    prepare_labels(cfg, {"test": [name]})
    coco = results(COCOEvaluator(name), expected)["bbox"]
    theirs = results(COCOEvaluator(stock, output_dir=str(tmp_path)), expected)["bbox"]
    np.testing.assert_equal(coco, theirs)
    assert 20 < coco["AP"] < 95


def test_voc_ap_of_some_of_its_classes(tmp_path):
    root = make_voc(tmp_path / "mine", ["person", "car"], {"val": list(range(8))})
    name = f"voc://{root}?split=val"
    records = get_records(name)
    assert MetadataCatalog.get(name).thing_classes == ["car", "person"]
    found = results(PascalVOCDetectionEvaluator(name), records)["bbox"]
    assert 20 < found["AP"] < 95 and found["AP50"] > found["AP75"]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("<pose>x</pose>", "", "AttributeError: 'NoneType' object has no attribute 'text'"),
        ("<xmin>", "<xmin>0", ""),
        ("</xmin>", ".5</xmin>", "ValueError: invalid literal for int"),
    ],
)
def test_voc_files_that_cannot_be_evaluated_are_refused_before(tmp_path, old, new, reason):
    root = make_voc(tmp_path / "mine", ["person", "car"], {"val": [0, 1, 2]})
    path = root / "Annotations/000002.xml"
    path.write_text(path.read_text().replace(old, new))
    cfg = get_config("detection/faster_rcnn_r50_c4_voc.py")
    name = f"voc://{root}?split=val"
    sources.register(name)
    if not reason:
        prepare_labels(cfg, {"test": [name]})
        return
    message = rf"{path} cannot be evaluated with VOC's metric \({reason}"
    with pytest.raises(UserError, match=message):
        prepare_labels(cfg, {"test": [name]})


@pytest.mark.parametrize(
    ("classes", "images", "message"),
    [
        (["weed", "crop"], [0, 1, 2], None),
        (["weed", "crop", "soil"], [0, 3], "val.txt has no image of soil, or only difficult ones"),
        (["weed", "n/a"], [0, 1, 2], "so 'n/a' is no name for one: rename it"),
        (["weed", "crop"], [0, 1, "", 2], r"val.txt: line 3 is empty.*remove it"),
        (["person", "car", "cat"], [0, 3], None),  # of VOC's classes some may be missing
    ],
)
def test_what_would_break_vocs_metric_after_the_training(tmp_path, classes, images, message):
    numbers = [n for n in images if n != ""]
    root = make_voc(tmp_path / "mine", classes, {"val": numbers, "train": list(range(6))})
    listing = root / "ImageSets/Main/val.txt"
    listing.write_text("".join(f"{n:06d}\n" if n != "" else "\n" for n in images))
    cfg = get_config("detection/faster_rcnn_r50_c4_voc.py")
    names = {"train": [f"voc://{root}?split=train"], "test": [f"voc://{root}?split=val"]}
    for (name,) in names.values():
        sources.register(name)
    if message is None:
        prepare_labels(cfg, names)
        return
    with pytest.raises(UserError, match=message):
        prepare_labels(cfg, names)


def test_voc_with_other_classes_has_the_same_ones_in_all_splits(tmp_path):
    splits = {"train": [0, 1, 2, 3], "val": [3, 6]}  # val: only two of the three classes
    root = make_voc(tmp_path / "mine", ["weed", "crop", "soil"], splits)
    for split in splits:
        records = get_records(f"voc://{root}?split={split}")
        assert MetadataCatalog.get(f"voc://{root}?split={split}").thing_classes == [
            "crop",
            "soil",
            "weed",
        ]
    assert [[a["category_id"] for a in r["annotations"]] for r in records] == [[2, 0], [2, 0]]
    with pytest.raises(UserError, match=r"no such file: .*ImageSets/Main/test\.txt"):
        get_records(f"voc://{root}?split=test")
    (root / "Annotations/000003.xml").unlink()
    with pytest.raises(UserError, match="lacks a file of .*train.txt: .*000003.xml"):
        get_records(f"voc://{root}?split=train&bits=9")
    (root / "Annotations/000002.xml").write_text("<annotation>")
    sources._voc_classes.cache_clear()
    with pytest.raises(UserError, match=r"000002\.xml is damaged"):
        get_records(f"voc://{root}?split=train&bits=10")


def test_a_lazy_name_in_a_config(coco_folder):
    from detectron2.config import LazyCall as L

    lazy = L(get_detection_dataset_dicts)(names=coco_name(coco_folder), filter_empty=False)
    register_named(OmegaConf.create({"train": {"register": []}, "dataset": lazy}))
    assert len(instantiate(lazy)) == 6


def test_crowds_alone_cannot_be_trained_on(coco_folder, caplog):
    change(coco_folder, lambda data: [a.update(iscrowd=1) for a in data["annotations"]])
    cfg = get_config("detection/mask_rcnn_r18_fpn_shapes.py")
    with pytest.raises(UserError, match="has no boxes: it cannot be trained on"):
        prepare_labels(cfg, {"train": [coco_name(coco_folder)]})
    prepare_labels(cfg, {"test": [coco_name(coco_folder)]})  # its detections are wanted, not its AP
    with pytest.raises(UserError, match="has no boxes, so its AP is undefined"):
        prepare_labels(cfg, {"train": [], "test": [coco_name(coco_folder)]})
    record = {"file_name": "x", "image_id": 1, "width": 4, "height": 4, "annotations": []}
    DatasetCatalog["mine"] = lambda: [record]
    MetadataCatalog.get("mine").thing_classes = ["a"]
    with pytest.raises(UserError, match="'mine' has no boxes, so its AP is undefined"):
        prepare_labels(cfg, {"train": [], "test": ["mine"]})
    sources.forget_labels()
    change(coco_folder, lambda data: data.pop("annotations"))  # as COCO's test-dev
    prepare_labels(cfg, {"train": [], "test": [coco_name(coco_folder)]})
    assert "has no annotations: detections are written, but there is no AP" in caplog.text


def test_edited_voc_labels_are_read_again(tmp_path):
    root = make_voc(tmp_path / "mine", ["person", "car"], {"val": [0, 1, 2]})
    name = f"voc://{root}?split=val"
    records = get_records(name)
    before = results(PascalVOCDetectionEvaluator(name), records)["bbox"]["AP"]
    for path in (root / "Annotations").iterdir():
        path.write_text(path.read_text().replace("person", "animal"))
    sources.forget_labels()
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
    again = get_records(name)
    assert MetadataCatalog.get(name).thing_classes == ["animal", "car"]
    found = results(PascalVOCDetectionEvaluator(name), again)["bbox"]["AP"]
    assert found > 0 and before > 0
