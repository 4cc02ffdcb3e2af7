"""``region_pretrain.finetune``, ``evaluate`` and ``show_detections`` in this process."""

import json
import logging
import os
import random

import numpy as np
import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from narrow import CPU, SMALL, narrow_config
from omegaconf import OmegaConf

import region_pretrain as rp
from region_pretrain.api.detectors import detection_config
from region_pretrain.config import get_config, load_config, to_yaml
from region_pretrain.reporting import pictures

CLASSES = ["dog", "ant", "cat"]  # by id


@pytest.fixture
def data(coco_folder):
    return (coco_folder / "ann.json", coco_folder / "images")


def arguments(data, output_dir, **changes):
    given = {
        "train": data,
        "val": data,
        "steps": 3,
        "batch_size": 2,
        "lr": 0.02,
        "output_dir": output_dir,
        "overrides": CPU,
    }
    return given | changes


def losses(run):
    return [row["total_loss"] for row in run.history() if "total_loss" in row]


def process():
    """What a run could leave changed in this process."""
    logs = [logging.getLogger(n) for n in ("fvcore", "detectron2", "region_pretrain")]
    return [
        os.getcwd(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        [(log.level, log.propagate, list(log.handlers)) for log in logs],
        dict(DatasetCatalog),
        {name: dict(vars(found)) for name, found in MetadataCatalog.items()},
        torch.backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
        torch.get_num_threads(),
    ]


def test_the_chain_from_pretraining_to_pictures(data, tmp_path, capsys):
    # Data sets that register themselves on import.
    rp.finetune(None, detector=narrow_config(), **arguments(data, tmp_path / "first", steps=1))
    capsys.readouterr()
    before = process()
    pretrained = rp.pretrain(
        "soco",
        images=data[1],
        detector=narrow_config(),
        regions=rp.make_regions(data[1], recipe="grid-v1", out=tmp_path / "r.arrow", workers=1),
        steps=2,
        batch_size=4,
        output_dir=tmp_path / "pre",
        overrides=SMALL,
    )
    given = arguments(data, tmp_path / "det", classes=CLASSES)
    run = rp.finetune(pretrained, **given)
    console = capsys.readouterr().out
    results = rp.evaluate(run)
    shown = np.asarray(rp.show_detections(run, count=2, min_score=0.0, height=64))
    assert process() == before

    same = "dataloader.test: the training sees"
    starts = ("iter 1/2", "iter 2/2", same, "iter 1/3", "iter 2/3", "iter 3/3")
    for line, start in zip(console.splitlines(), starts, strict=True):
        assert line.split("]: ", 1)[1].startswith(start)
    log = (tmp_path / "det/log.txt").read_text()
    assert "Average Precision  (AP) @[ IoU=0.50:0.95" in log and "weights from" in log
    assert run.classes == CLASSES and run.config.model.roi_heads.num_classes == 3
    assert run.config.train.init_checkpoint == pretrained.checkpoint
    saved = json.loads((tmp_path / "det/results.json").read_text())
    assert run.results == saved == results
    assert json.loads((tmp_path / "det/results_eval.json").read_text()) == saved
    assert f"bbox AP={saved['bbox']['AP']:.1f}" in repr(run)

    # The detector is also found beside the file of the pre-training's weights.
    again = rp.finetune(pretrained.checkpoint, **{**given, "output_dir": tmp_path / "again"})
    assert losses(again) == losses(run)
    # Beside the checkpoint of a fine-tuning is its config.
    assert rp.evaluate(tmp_path / "det", overrides=CPU) == results

    from region_pretrain.data.sources import register_named

    cfg = load_config(str(tmp_path / "det/config.yaml"))
    register_named(cfg)
    truth = pictures.ground_truth_pictures(cfg, pictures.first_records(cfg, 2))
    assert np.array_equal(shown[:, :80], pictures.sheet([[t] for t in truth], 64))
    assert shown.shape == (2 * 72 + 8, 2 * 72 + 8, 3)
    others = np.asarray(rp.show_detections(run, data[1], count=2, min_score=0.0, height=64))
    assert others.shape == (2 * 72 + 8, 80, 3)


def records_of(folder):
    data = json.loads((folder / "ann.json").read_text())
    indices = {3: 0, 7: 1, 12: 2}
    records = []
    for image in sorted(data["images"], key=lambda i: i["id"]):
        boxes = [
            {
                "bbox": a["bbox"],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": indices[a["category_id"]],
                "segmentation": a["segmentation"],
                "iscrowd": 0,
            }
            for a in data["annotations"]
            if a["image_id"] == image["id"]
        ]
        path = str(folder / "images" / image["file_name"])
        records.append(
            {"file_name": path, "image_id": image["id"], "width": 64, "height": 64}
            | {"annotations": boxes}
        )
    return records


def test_records_are_labelled_data(data, coco_folder, tmp_path):
    records = records_of(coco_folder)
    run = rp.finetune(
        None,
        detector=narrow_config(),
        classes=CLASSES,
        **arguments(records, tmp_path / "a"),
    )
    by_json = rp.finetune(None, detector=narrow_config(), **arguments(data, tmp_path / "b"))
    assert losses(run) == losses(by_json)
    assert rp.evaluate(run) == run.results
    assert rp.evaluate(run, data) == by_json.results
    assert not [name for name in DatasetCatalog if name.startswith("records-")]


def test_a_built_detector_is_fine_tuned_itself(data, tmp_path):
    cfg = narrow_config()
    with pytest.raises(rp.UserError, match="predicts 8 classes, but the data have 3"):
        rp.finetune(instantiate(cfg.model), **arguments(data, tmp_path / "a"))
    cfg.model.roi_heads.num_classes = 3
    detector = instantiate(cfg.model)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    resize = "dataloader.train.mapper.augmentations=[]"
    overrides = [*CPU, resize, "dataloader.test.mapper.augmentations=[]"]
    overrides += ["train.freeze=[backbone.bottom_up.stem]"]
    given = arguments(data, tmp_path / "b", overrides=overrides, epochs=None)
    with pytest.raises(rp.UserError, match="init is a built detector, which would be trained itse"):
        rp.finetune(detector, **{**given, "detector": narrow_config()})
    run = rp.finetune(detector, **given)
    assert run.model is detector and detector.training
    assert not any("train" in module.__dict__ for module in detector.modules())
    changed = [name for name, value in detector.named_parameters() if (value != before[name]).any()]
    assert "roi_heads.mask_head.predictor.weight" in changed and len(changed) > 80
    assert run.config.dataloader.train.mapper.image_format == "RGB"
    assert rp.evaluate(detector, data, overrides=overrides, output_dir=tmp_path) == run.results
    # One of an own network that starts from a file.
    again = rp.finetune(
        run, **{**given, "output_dir": tmp_path / "c", "overrides": ["optimizer.lr=1", *overrides]}
    )
    assert again.model is detector and again.config.train.init_checkpoint == run.checkpoint


def test_a_checkpoint_in_the_current_folder_and_edited_labels(
    data, coco_folder, tmp_path, monkeypatch
):
    run = rp.finetune(None, detector=narrow_config(), **arguments(data, tmp_path / "run"))
    monkeypatch.chdir(tmp_path / "run")
    assert rp.evaluate("model_final.pth", data, output_dir=tmp_path / "eval") == run.results
    content = json.loads((coco_folder / "ann.json").read_text())
    content["annotations"] = content["annotations"][:1]
    kept = content["annotations"][0]["category_id"]
    (coco_folder / "ann.json").write_text(json.dumps(content))
    found = rp.evaluate("model_final.pth", data, output_dir=tmp_path / "eval")["bbox"]
    names = {c["id"]: c["name"] for c in content["categories"]}
    having = {k for k, v in found.items() if k.startswith("AP-") and v is not None}
    assert having == {f"AP-{names[kept]}"}
    log = rp.finetune(
        "model_final.pth", **arguments(data, tmp_path / "again", steps=1, epochs=None)
    )
    assert log.results["bbox"].keys() == run.results["bbox"].keys()
    text = (tmp_path / "again/log.txt").read_text()
    assert "1 box" in text


def test_results_are_written_beside_the_weights(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rp.finetune(None, detector=narrow_config(), **arguments(data, "det"))
    os.rename("det", "renamed")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for folder in ("../renamed", "../renamed/model_final.pth"):
        rp.evaluate(folder, overrides=CPU)
        os.remove(tmp_path / "renamed/results_eval.json")
    assert not list((tmp_path / "elsewhere").iterdir()) and not (tmp_path / "det").exists()


def test_overrides_of_a_yacs_config_and_of_the_number_of_classes():
    name = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    for detector in (name, model_zoo.get_config(name)):
        upper = ["MODEL.RESNETS.NORM=SyncBN", "optimizer.lr=0.5"]
        cfg = detection_config(detector, upper)
        assert OmegaConf.select(cfg, "model.cfg.MODEL.RESNETS.NORM") == "SyncBN"
        assert cfg.optimizer.lr == 0.5


def test_the_error_of_a_run_that_registers_a_missing_file_is_its_own(data, tmp_path):
    text = to_yaml(get_config("detection/mask_rcnn_r18_fpn_shapes.py"))
    (tmp_path / "config.yaml").write_text(text.replace("register: []", "register: [/gone.py]"))
    (tmp_path / "model_final.pth").touch()
    with pytest.raises(rp.UserError, match="train.register: .*/gone.py"):
        rp.finetune(str(tmp_path), **arguments(data, tmp_path / "out"))


def test_an_overridden_number_of_classes_is_compared_with_the_data(data, tmp_path):
    given = arguments(data, tmp_path / "a")
    upper = {**given, "overrides": [*given["overrides"], "MODEL.ROI_HEADS.NUM_CLASSES=4"]}
    with pytest.raises(rp.UserError, match="NUM_CLASSES=4, but coco://.* has 3 classes"):
        rp.finetune(None, detector="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", **upper)
    given["overrides"] = [*given["overrides"], "model.roi_heads.num_classes=4"]
    with pytest.raises(rp.UserError, match="num_classes=4, but coco://.* has 3 classes"):
        rp.finetune(None, detector=narrow_config(), **given)


BAD = [
    ({"init": "absent.pth"}, "there is no absent.pth: name the folder of a finished run"),
    ({"init": __file__}, "weights do not come with a detection config: give detector="),
    ({"init": None, "detector": None}, "give detector=CONFIG"),
    ({"train": "folder"}, "a folder has no boxes"),
    ({"val": "coco://x"}, "has no images="),
    ({"classes": ["dog"]}, r"classes=\['dog'\], but the data's are \['dog', 'ant', 'cat'\]"),
    ({"train": [{"file_name": "x", "annotations": []}]}, "train: records with annotations need"),
    *(
        ({"val": [{"file_name": "x", **record}], "classes": ["a"]}, message)
        for record, message in (
            ({"annotations": []}, r"val\[0\]: a record needs 'image_id'"),
            ({"image_id": 1, "annotations": [{"bbox": [1, 2, 3, 4]}]}, "0 needs 'bbox_mode'"),
        )
    ),
    *(
        ({"train": [{"file_name": "x.jpg", "annotations": [{"bbox": [1, 2, 3, 4], "bbox_mode": 0,
          **wrong}]}], "classes": ["a", "b"]},
         rf"^train\[0\]: annotation 0 of x.jpg has category_id={shown}, but .* are 0 to 1, .*json")
        for wrong, shown in (({"category_id": 900}, "900"), ({"category_id": "zebra"}, "'zebra'"),
                             ({"category_id": -1}, "-1"), ({}, "None"))
    ),
    ({"overrides": ["MODEL.MASK_ON=False"]}, "MASK_ON=False': the detector is not a yacs config"),
    ({"steps": 0}, "nothing to train"),
    ({"steps": 2, "overrides": ["+train.max_iter=3"]}, r"steps=2 replaces .*max_iter=3': give one"),
    ({"detector": "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"}, "not a detection config"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_one_error(data, tmp_path, changes, message):
    given = {"init": None, "detector": narrow_config(), **arguments(data, tmp_path / "a")}
    if changes.get("train") == "folder":
        changes = {"train": data[1]}
    if changes.get("init"):
        given.pop("detector")
    with pytest.raises(rp.UserError, match=message) as error:
        rp.finetune(**{**given, **changes})
    assert "\n" not in str(error.value)


def test_bad_arguments_of_pictures_and_evaluation(tmp_path):
    with pytest.raises(rp.UserError, match="run='x': must be what finetune returned"):
        rp.show_detections("x")
    with pytest.raises(rp.UserError, match="there is no absent: name"):
        rp.evaluate("absent")
    (tmp_path / "model_0000002.pth").write_text("")
    with pytest.raises(rp.UserError, match="is not finished: .*resume=True.*_0000002.pth"):
        rp.evaluate(str(tmp_path))
    (tmp_path / "model_final.pth").write_text("")
    with pytest.raises(rp.UserError, match="give config=CONFIG"):
        rp.evaluate(str(tmp_path))
    with pytest.raises(rp.UserError, match="data= is needed to evaluate a built detector"):
        rp.evaluate(torch.nn.Linear(1, 1))
    with pytest.raises(rp.UserError, match="count=0, height=224"):
        rp.show_views("projects/SoCo/configs/soco_r18-fpn_b32_shapes.py", 0)
