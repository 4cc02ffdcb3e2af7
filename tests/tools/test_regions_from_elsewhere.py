"""From another program's boxes to a pre-trained detector, with the commands that users type."""

from __future__ import annotations

import json
import os

import pytest
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from omegaconf import ListConfig

from region_pretrain.commands import make_regions
from region_pretrain.config import get_config
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError
from region_pretrain.overrides import apply_overrides
from region_pretrain.regions import RegionStore
from region_pretrain.regions.elsewhere import refuse_annotations


@pytest.fixture
def results(tmp_path, coco_folder, monkeypatch):
    """COCO's results for the six images of ``coco_folder``: its boxes, with scores."""
    monkeypatch.chdir(coco_folder)
    annotations = json.loads((coco_folder / "ann.json").read_text())["annotations"]
    entries = [
        {"image_id": a["image_id"], "category_id": 1, "bbox": a["bbox"], "score": 1 / a["id"]}
        for a in annotations
    ]
    (coco_folder / "results.json").write_text(json.dumps(entries))
    return entries


def run_soco(folder, store, recipe, *overrides):
    cfg = get_config("projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")
    settings = [
        f"train.output_dir={folder}",
        "dataloader.train.dataset.names=coco://ann.json?images=images",
        f"dataloader.train.dataset.regions={store}",
        f'dataloader.train.dataset.recipe="{recipe}"',
        "dataloader.train.dataset.views.sizes=[32,32,32]",
        "dataloader.train.total_batch_size=2",
        "dataloader.train.num_workers=0",
        "train.max_iter=3",
        "train.log_period=1",
        "train.device=cpu",
        *overrides,
    ]
    do_pretrain(apply_overrides(cfg, settings))


def test_three_steps_of_soco_on_cocos_results(results, tmp_path, capsys):
    data = "coco://ann.json?images=images"
    arguments = ["--dataset", data, "--from", "results.json", "--out", "r.arrow", "--workers", "1"]
    make_regions.main([*arguments, "--min-score", "0.1", "--top", "1"])
    store = RegionStore.open("r.arrow")
    recipe = store.manifest["recipe"]
    assert recipe.startswith("file-v1+min_score=0.1+source=") and recipe.endswith("+top=1")
    for key in store.keys():  # the first of an image's two boxes has the higher score
        boxes = [e["bbox"] for e in results if e["image_id"] == int(key) and e["score"] >= 0.1]
        expected = [[x, y, x + w, y + h] for x, y, w, h in boxes[:1]]
        assert store.boxes(key).tolist() == expected
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"r.arrow: recipe {recipe}"
    assert printed[1] == "images: 6, and 0 unreadable files skipped"
    # The json of the data set has these very boxes: 5 of the 12, and nothing else.
    assert printed[-2].startswith("recall: 0.417 at IoU 0.5")
    assert printed[-1].startswith("precision: 1.000 of the boxes")

    run_soco(tmp_path / "run", "r.arrow", recipe)
    lines = (tmp_path / "run/metrics.json").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2]
    assert os.path.exists(tmp_path / "run/model_final.pth")
    with pytest.raises(UserError, match="but the config requires 'file-v1.source=0000'"):
        run_soco(tmp_path / "other", "r.arrow", "file-v1+source=0000")


def test_a_config_that_names_the_boxes(results, tmp_path, capsys):
    """The config's data, store and recipe; other boxes than its recipe's are refused."""
    arguments = ["--from", "results.json", "--workers", "1"]
    make_regions.main(
        ["--dataset", "coco://ann.json?images=images", "--out", "a.arrow", *arguments]
    )
    recipe = RegionStore.open("a.arrow").manifest["recipe"]
    cfg = get_config("projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")
    dataset = cfg.dataloader.train.dataset
    dataset.update(names="coco://ann.json?images=images", regions="b.arrow")
    LazyConfig.save(cfg, "config.yaml")
    capsys.readouterr()
    make_regions.main(["--config-file", "config.yaml", *arguments])
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"to train on them: 'dataloader.train.dataset.recipe=\"{recipe}\"'"
    make_regions.main(
        ["--config-file", "config.yaml", *arguments, f'dataloader.train.dataset.recipe="{recipe}"']
    )
    assert "to train on them" not in capsys.readouterr().out
    wrong = [*arguments, "--top", "1", f'dataloader.train.dataset.recipe="{recipe}"']
    with pytest.raises(SystemExit):
        make_regions.main(["--config-file", "config.yaml", *wrong])
    assert (
        f"requires recipe {recipe}, but these boxes are {recipe}+top=1" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--from results.json --from-detector a b",
            "--from, --from-detector and --from-features exclude each other",
        ),
        ("--from results.json --recipe soco-v1", "--recipe does not apply to boxes from elsewhere"),
        ("--from results.json --working-size 9", "--working-size does not apply"),
        ("--from results.json --detections", "--detections needs --from-detector"),
        ("--from-detector a b --ids x.json", "--ids needs --from"),
        ("--min-score 0.5", "--min-score needs --from, --from-detector or --from-features"),
        ("--from results.json --batch-size 2", "--batch-size needs --from-detector or --from-feat"),
        ("--from-features a b --set clusters=1", "features-v1: clusters=1: must be whole numbers"),
        ("--from-features a b --min-score 0.5", "min_score=0.5: these boxes have no scores"),
        ("--from results.json --top few", "top=few is not a whole number"),
        ("--from missing.json", "no such file or folder of boxes: missing.json"),
        ("--from ann.json", "ann.json has the annotations of coco://ann.json"),
        (
            "--recipe file-v1",
            "file-v1 needs its source: region-pretrain regions --from PATH",
        ),
        ("--from-detector missing.py x.pth", "missing.py"),
    ],
)
def test_invalid_arguments_end_with_one_line(results, arguments, message, capsys):
    data = ["--dataset", "coco://ann.json?images=images", "--out", "r.arrow"]
    with pytest.raises(SystemExit) as exit_:
        make_regions.main([*data, *arguments.split()])
    assert exit_.value.code == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line
    assert not os.path.exists("r.arrow") and not os.path.exists("r.arrow.parts")


def test_annotations_of_a_registered_data_set_are_refused_too(results, capsys):
    register_coco_instances("own_annotated", {}, "ann.json", "images")
    try:
        with pytest.raises(SystemExit):
            make_regions.main(
                ["--dataset", "own_annotated", "--out", "r.arrow", "--from", "./ann.json"]
            )
    finally:
        DatasetCatalog.remove("own_annotated"), MetadataCatalog.remove("own_annotated")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ./ann.json has the annotations of own_annotated")
    assert not os.path.exists("r.arrow")


def test_annotations_of_a_config_with_several_data_sets_are_refused_too():
    names = ListConfig(["folder://images", "coco://ann.json?images=images"])
    with pytest.raises(UserError, match="ann.json has the annotations of coco://ann.json"):
        refuse_annotations("./ann.json", names)
    refuse_annotations("./other.json", names)


def test_jobs_receive_the_arguments(results, monkeypatch):
    made = []
    monkeypatch.setattr(
        "region_pretrain.jobs.submission._submit", lambda jobs, *_: made.extend(jobs)
    )
    array = ["--shards", "2", "--slurm", "partition=cpu"]
    data = ["--dataset", "coco://ann.json?images=images", "--out", "r.arrow"]
    file = ["--from", "results.json", "--min-score", "0.5", "--nms-iou", "0.7", "--with-zero"]
    make_regions.main([*data, *file, *array])
    args = make_regions.make_parser().parse_args(made[1].arguments)
    assert (args.boxes, args.min_score, args.nms_iou) == ("results.json", "0.5", "0.7")
    assert (args.with_zero, args.top, args.recipe, args.shard) == (True, None, None, "1/2")
    make_regions.main([*data, "--from-detector", "c.py", "w.pth", "--batch-size", "3", *array])
    args = make_regions.make_parser().parse_args(made[-1].arguments)
    assert (args.from_detector, args.batch_size, args.detections) == (["c.py", "w.pth"], 3, False)
    made.clear()
    make_regions.main([*data, "--from-features", "c.py", "w.pth", "--set", "stride=4", *array])
    args = make_regions.make_parser().parse_args(made[-1].arguments)
    assert (args.from_features, args.from_detector, args.set) == (
        ["c.py", "w.pth"],
        None,
        ["stride=4"],
    )
