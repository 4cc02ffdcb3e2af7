"""Several calls in one process: what they share, and what one must not change for another."""

import json
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import GeneralizedRCNN
from narrow import CPU, SMALL, narrow_config
from torch.nn.modules.module import register_module_forward_pre_hook

import region_pretrain as rp
from region_pretrain.api.data import DataSets
from region_pretrain.data.catalog import get_records
from region_pretrain.modeling.given import refer_to, without_numbers
from region_pretrain.regions import RegionStore

ROOT = Path(__file__).parents[2]
PLAIN = [
    *CPU,
    "dataloader.train.mapper.augmentations=[]",
    "dataloader.test.mapper.augmentations=[]",
]


@pytest.fixture
def data(coco_folder):
    return (coco_folder / "ann.json", coco_folder / "images")


def built(classes=3):
    cfg = narrow_config()
    cfg.model.roi_heads.num_classes = classes
    return instantiate(cfg.model)


def weights(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one, other):
    return all(torch.equal(value, other[name]) for name, value in one.items())


@contextmanager
def weights_that_predict():
    """The weights of each detector that is called meanwhile, one entry a call."""
    seen = []

    def hook(module, _):
        if isinstance(module, GeneralizedRCNN):
            seen.append(weights(module))

    handle = register_module_forward_pre_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


def finetuned(init, data, folder, **changes):
    given = dict(train=data, val=data, steps=2, batch_size=2, lr=0.02, output_dir=folder)
    return rp.finetune(init, **{**given, "overrides": PLAIN, **changes})


def test_an_evaluation_from_a_folder_leaves_the_built_detector_alone(data, tmp_path):
    detector = built()
    first = finetuned(detector, data, tmp_path / "a")
    after_first = weights(detector)
    second = finetuned(detector, data, tmp_path / "b")
    after, training = weights(detector), detector.training
    assert not same(after_first, after)
    with weights_that_predict() as seen:
        assert rp.evaluate(tmp_path / "a") == first.results
        assert same(after, detector.state_dict()) and detector.training == training
        assert rp.evaluate(second) == second.results
    assert same(after_first, seen[0]) and same(after, seen[-1])


def test_a_run_of_a_built_detector_is_that_detector_for_the_next_one(data, coco_folder, tmp_path):
    detector = built()
    frozen = [*PLAIN, "train.freeze=[backbone.bottom_up.stem]"]
    run = finetuned(detector, data, tmp_path / "a")
    finetuned(run, data, tmp_path / "b", overrides=frozen)
    assert all(p.requires_grad for p in detector.parameters())
    assert not any("train" in module.__dict__ for module in detector.modules())
    content = json.loads((coco_folder / "ann.json").read_text())
    content["categories"].append({"id": 99, "name": "fox"})
    content["annotations"][0]["category_id"] = 99
    (coco_folder / "more.json").write_text(json.dumps(content))
    with pytest.raises(rp.UserError, match="predicts 3 classes, but the data have 4"):
        finetuned(run, (coco_folder / "more.json", data[1]), tmp_path / "c")


def test_a_config_of_a_built_detector_keeps_its_weights(region_folder, tmp_path):
    detector = built()
    for module in detector.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.constant_(module.weight, 0.5)
    before = weights(detector)
    cfg = rp.pretrain_config(
        "soco",
        images=region_folder.images,
        regions=RegionStore.open(str(region_folder.store)),
        detector=detector,
        steps=1,
        batch_size=4,
        output_dir=tmp_path / "pre",
        overrides=[*SMALL, "optimizer.lr=0"],
    )
    rp.show_views(cfg, 2, own=False)
    assert same(before, detector.state_dict())
    run = rp.pretrain(cfg)
    norms = {k: v for k, v in before.items() if k.endswith("norm.weight")}
    assert len(norms) > 20 and same(norms, detector.state_dict())
    assert all(p.requires_grad for p in detector.parameters()) and run.detector is detector


def test_a_second_detector_of_the_same_shapes_resumes_the_run_of_the_first(
    region_folder, tmp_path, data
):
    first = built()
    run = finetuned(first, data, tmp_path / "a", steps=2)
    second = built()  # `first` still exists, as after an error whose traceback refers to it
    resumed = finetuned(second, data, tmp_path / "a", steps=2, resume=True)
    assert refer_to(second) != refer_to(first)
    assert without_numbers(refer_to(second)) == without_numbers(refer_to(first))
    assert resumed.results == run.results and same(first.state_dict(), second.state_dict())
    narrower = narrow_config()
    narrower.model.roi_heads.num_classes = 3
    narrower.model.roi_heads.box_head.fc_dims = [16]
    narrower.model.roi_heads.box_predictor.input_shape.channels = 16
    with pytest.raises(rp.UserError, match="cannot resume with a config that differs"):
        finetuned(instantiate(narrower.model), data, tmp_path / "a", steps=2, resume=True)


def test_class_names_of_an_evaluation_are_those_of_the_fine_tuning(data, coco_folder, tmp_path):
    run = finetuned(None, data, tmp_path / "a", detector=narrow_config())
    content = json.loads((coco_folder / "ann.json").read_text())
    names = [c["name"] for c in content["categories"]]
    for category, name in zip(content["categories"], [names[1], names[0], names[2]], strict=True):
        category["name"] = name
    (coco_folder / "other.json").write_text(json.dumps(content))
    with pytest.raises(rp.UserError, match="other classes than those of the fine-tuning: class 0"):
        rp.evaluate(run, (coco_folder / "other.json", data[1]))
    threshold = "model.roi_heads.box_predictor.test_score_thresh=0.9"
    with pytest.raises(rp.UserError, match="would not change the detector, which is built"):
        rp.evaluate(run, overrides=[threshold])
    assert rp.evaluate(run.output_dir, overrides=[*CPU, threshold]) != run.results


def test_a_pre_training_is_not_evaluated(region_folder, tmp_path):
    run = rp.pretrain(
        "soco",
        images=region_folder.images,
        regions=RegionStore.open(str(region_folder.store)),
        detector=narrow_config(),
        steps=1,
        batch_size=4,
        output_dir=tmp_path / "pre",
        overrides=SMALL,
    )
    with pytest.raises(rp.UserError, match="pre is a pre-training, not a detector"):
        rp.evaluate(run, region_folder.images)


@pytest.mark.parametrize("several", [False, True])
def test_an_evaluator_with_a_name_of_its_own_follows_val(data, tmp_path, several):
    cfg = narrow_config()
    cfg.dataloader.evaluator.dataset_name = "my_val"
    if several:
        cfg.dataloader.evaluator = [cfg.dataloader.evaluator]
    DatasetCatalog.register("my_val", lambda: [])
    try:
        run = finetuned(None, data, tmp_path / "a", detector=cfg)
    finally:
        DatasetCatalog.remove("my_val")
        MetadataCatalog.pop("my_val", None)
    assert run.results == finetuned(None, data, tmp_path / "b", detector=narrow_config()).results


def test_the_learning_rate_of_a_built_detector(data, tmp_path):
    """Detectron2's 1x schedule is one for 16 images; lr= is that of the batch size in use."""
    for name, lr in (("a", None), ("b", 0.01)):
        finetuned(built(), data, tmp_path / name, steps=1, lr=lr)
    logs = [(tmp_path / name / "log.txt").read_text() for name in "ab"]
    assert "lr 0.02 * 2 / 16 = 0.0025, " in logs[0] and "lr 0.01, " in logs[1]


def test_a_keypoint_head_needs_its_complete_config(data, tmp_path):
    detector = built()
    detector.roi_heads.keypoint_on = True
    with pytest.raises(rp.UserError, match="keypoint head: pass its complete config"):
        finetuned(detector, data, tmp_path / "a")


def test_regions_of_an_override_are_used(region_folder, tmp_path):
    given = dict(images=region_folder.images, detector=narrow_config(), output_dir=tmp_path)
    own = "dataloader.train.dataset.regions=mine.arrow"
    cfg = rp.pretrain_config("soco", overrides=[own], **given)
    assert cfg.dataloader.train.dataset.regions == "mine.arrow"
    cfg = rp.pretrain_config("soco", **given)
    assert cfg.dataloader.train.dataset.regions.startswith(f"{tmp_path}/regions-")


def test_a_recipe_of_ones_own_is_a_method(region_folder, tmp_path):
    recipe = tmp_path / "mine.py"
    recipe.write_text((ROOT / "projects/MoCo/configs/common/moco.py").read_text())
    given = dict(images=region_folder.images, detector=narrow_config(), output_dir=tmp_path)
    mine, theirs = (rp.pretrain_config(name, **given) for name in (recipe, "moco"))
    assert mine.model == theirs.model and mine.dataloader == theirs.dataloader
    with pytest.raises(rp.UserError, match="needs detector=: a detection config or a detector"):
        rp.pretrain_config(recipe, images=region_folder.images)
    recipe.write_text("def f(:")
    with pytest.raises(rp.UserError, match=r"mine.py cannot be loaded: .*invalid syntax"):
        rp.pretrain_config(recipe, **given)


def test_labelled_records_are_images_too(coco_folder, tmp_path):
    names = f"coco://{coco_folder}/ann.json?images={coco_folder}/images"
    records = get_records(names, annotations=True)
    assert any(record.get("annotations") for record in records)
    store = rp.make_regions(records, recipe="ground_truth-v1", out=tmp_path / "r.arrow", workers=1)
    boxes = sum(len(store.boxes(str(record["image_id"]))) for record in records)
    assert boxes > 0 and store.summary["recall@0.5"] == 1.0


def test_equal_records_have_one_name_in_every_process():
    path = "images/1.jpg"
    records = [{"file_name": path, "image_id": path, "height": np.int64(5)}]
    again = json.loads(json.dumps([{"height": 5, "image_id": path, "file_name": path}]))
    assert DataSets().name("images", records) == DataSets().name("images", again)
    assert DataSets().name("x", [{**records[0], "pairs": {(0, 1): 2, 3: b"4"}}])
    again[0]["height"] = 6
    assert DataSets().name("images", records) != DataSets().name("images", again)
