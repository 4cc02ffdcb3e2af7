"""The probe of a detection config and a checkpoint."""

import json

import pytest
import torch
from detectron2.config import instantiate
from zoo import SMALL

from region_pretrain.config import load_config
from region_pretrain.data.few_label import random_fraction
from region_pretrain.errors import UserError
from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.features import model_reader, read_regions
from region_pretrain.evaluation.knn import knn_classify
from region_pretrain.evaluation.linear import linear_classify
from region_pretrain.evaluation.probe import do_probe, table
from region_pretrain.evaluation.scenes import SECOND_VIEW, retrieve, variance_within

SHAPES = "configs/detection/mask_rcnn_r18_fpn_shapes.py"


def config(name, folder, *overrides):
    return load_config(
        name,
        [
            *(SMALL if name.endswith("yaml") else []),
            "dataloader.train.dataset.names=probe_train",
            "dataloader.test.dataset.names=probe_val",
            f"train.output_dir={folder}",
            "train.device=cpu",
            *overrides,
        ],
    )


def checkpoint(folder, *prefixes):
    """Weights of the Shapes detector, of the modules whose names start with a prefix."""
    torch.manual_seed(5)
    model = instantiate(load_config(SHAPES, ["model.roi_heads.num_classes=3"]).model).eval()
    state = {k: v for k, v in model.state_dict().items() if k.startswith(prefixes)}
    torch.save({"model": state}, folder / "weights.pth")
    return model, f"train.init_checkpoint={folder}/weights.pth"


def test_values_are_those_of_the_classifiers(names, dicts, tmp_path):
    model, weights = checkpoint(tmp_path, "")
    cfg = config(SHAPES, tmp_path, weights, "model.roi_heads.num_classes=3", "train.seed=3")
    result = do_probe(cfg, k=3)
    reader = model_reader(model)
    train, test = (
        read_regions(model, reader, part, input_format="RGB") for part in (dicts[:6], dicts[6:])
    )
    second = read_regions(model, reader, dicts[6:], SECOND_VIEW, input_format="RGB")
    assert list(result["levels"]) == ["trunk", "fpn", "head"]
    for level, found in result["levels"].items():
        x, test_x = train.features[level], test.features[level]
        by_neighbours = accuracy_of(knn_classify(x, train.labels, test_x, k=3), test.labels)
        predicted, penalty = linear_classify(x, train.labels, test_x, seed=3)
        linear = accuracy_of(predicted, test.labels)
        assert found == {
            "weights": "loaded",
            "dimensions": {"trunk": 288, "fpn": 48, "head": 256}[level],
            "knn": {"top1": by_neighbours.top1, "per_class": by_neighbours.per_class},
            "linear": {"top1": linear.top1, "per_class": linear.per_class, "l2": penalty},
            "retrieval": retrieve(test_x, second.features[level], test.images).top1,
            "variance_within": variance_within(test_x, test.images),
        }
        assert 0 < found["variance_within"] < 1.5
    assert test.images.tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert result["retrieval_chance"] == 0.4  # 4 images, 10 boxes
    assert result["levels"]["fpn"]["linear"]["top1"] > 0.5  # colours are easy
    assert (result["train"], result["test"]) == (
        {"images": 6, "boxes": 15},
        {"images": 4, "boxes": 10},
    )
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    lines = table(result).splitlines()
    assert lines[0].startswith("10 boxes of 4 images, classified by 15 boxes of 6 images")
    assert lines[1].split()[:4] == ["level", "weights", "features", "3-NN"]
    found = result["levels"]["trunk"]
    numbers = [f"{100 * v:.1f}" for v in [*found["knn"].values()] + [*found["linear"].values()][:2]]
    numbers += [f"{100 * found[key]:.1f}" for key in ("retrieval", "variance_within")]
    assert lines[3].split() == ["trunk", "loaded", "288", *numbers, f"{found['linear']['l2']:g}"]


def test_what_a_checkpoint_leaves_random_is_named(names, tmp_path):
    options = ["model.roi_heads.num_classes=3"]
    _, weights = checkpoint(tmp_path, "backbone.bottom_up.")
    result = do_probe(config(SHAPES, tmp_path, weights, *options), max_images=2)
    assert [found["weights"] for found in result["levels"].values()] == [
        "loaded",
        "random",
        "random",
    ]
    assert (result["train"]["images"], result["test"]["images"]) == (2, 2)
    _, weights = checkpoint(tmp_path, "backbone.bottom_up.res", "backbone.fpn_lateral")
    cfg = config(SHAPES, tmp_path, weights, *options, "train.init_partial=True")
    result = do_probe(cfg, max_images=2)
    assert [found["weights"] for found in result["levels"].values()] == [
        "partly random",
        "partly random",
        "random",
    ]
    result = do_probe(config(SHAPES, tmp_path, *options), max_images=2)
    assert {found["weights"] for found in result["levels"].values()} == {"random"}
    assert result["checkpoint"] is None


@pytest.mark.parametrize(
    ("name", "levels"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", ["trunk", "fpn", "tower"]),
        ("COCO-Detection/faster_rcnn_R_50_C4_1x.yaml", ["trunk", "fpn", "head"]),
        (
            "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
            ["trunk", "fpn", *(f"head_stage{i}" for i in range(3))],
        ),
    ],
)
def test_model_zoo(names, tmp_path, name, levels):
    result = do_probe(config(name, tmp_path), k=5)
    assert list(result["levels"]) == levels
    for found in result["levels"].values():
        assert 0 <= found["knn"]["top1"] <= 1 and found["linear"]["per_class"] > 0


def test_training_regions_may_be_a_few_label_subset(names, tmp_path):
    dataset = "dataloader.train.dataset"
    cfg = config(
        SHAPES,
        tmp_path,
        "model.roi_heads.num_classes=3",
        f"{dataset}._target_=region_pretrain.data.few_label.random_fraction",
        f"+{dataset}.fraction=0.5",
        f"+{dataset}.seed=1",
    )
    expected = random_fraction("probe_train", 0.5, seed=1)
    result = do_probe(cfg)
    boxes = sum(not a["iscrowd"] for d in expected for a in d["annotations"])
    assert result["train"] == {"images": 3, "boxes": boxes}


def test_bad_input_is_one_line(names, tmp_path):
    options = ["model.roi_heads.num_classes=3"]
    with pytest.raises(UserError, match="k=0 and max_images=5 must be at least 1"):
        do_probe(config(SHAPES, tmp_path), k=0, max_images=5)
    cfg = config(SHAPES, tmp_path, *options)
    cfg.dataloader.test.mapper = None
    with pytest.raises(UserError, match="dataloader.test.mapper has no augmentations"):
        do_probe(cfg)
    _, weights = checkpoint(tmp_path, "")
    content = torch.load(tmp_path / "weights.pth")
    content["model"]["roi_heads.box_head.fc1.weight"][0] = torch.nan
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="features of level head are not finite"):
        do_probe(config(SHAPES, tmp_path, weights, *options))
    with pytest.raises(UserError, match="x.pth"):
        do_probe(config(SHAPES, tmp_path, *options, "train.init_checkpoint=x.pth"))
