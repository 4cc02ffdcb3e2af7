"""Keypoints that a training would learn mirrored, or that its evaluation would miss."""

import pytest

from region_pretrain.config import get_config
from region_pretrain.data.catalog import get_records
from region_pretrain.data.inspection import prepare_labels
from region_pretrain.data.other_labels import check_other_labels
from region_pretrain.data.sources import register
from region_pretrain.errors import UserError


@pytest.fixture
def config(write_coco):
    """A detector of as many keypoints as are named, and a json of them that a function changes."""

    def config(names, change=lambda data: None):
        def with_keypoints(data):
            for annotation in data["annotations"]:
                annotation.update(keypoints=[9, 9, 2] * len(names), num_keypoints=len(names))
            for category in data["categories"]:
                category["keypoints"] = names
            change(data)

        path, root = write_coco(with_keypoints)
        cfg = get_config("detection/keypoint_rcnn_r50_fpn.py")
        cfg.dataloader.train.dataset.names = cfg.dataloader.test.dataset.names = (
            f"coco://{path}?images={root}"
        )
        register(cfg.dataloader.train.dataset.names)
        cfg.model.roi_heads.keypoint_head.num_keypoints = len(names)
        return cfg

    return config


@pytest.mark.parametrize(
    ("names", "warned"),
    [
        (["l_eye", "r_eye"], True),
        (["left_eye", "right_eye"], False),
        (["nose", "Left_ear", "Right_ear"], False),
        (["nose"], False),
    ],
)
def test_sides_that_a_flip_does_not_exchange_are_named(config, caplog, names, warned):
    cfg = config(names)
    records = get_records(cfg.dataloader.train.dataset.names)
    check_other_labels(records, cfg)
    assert ("does not exchange any keypoints: l_eye, r_eye" in caplog.text) == warned
    assert ("left_" in caplog.text and "keypoint_flip_map" in caplog.text) == warned
    caplog.clear()
    flip = cfg.dataloader.train.mapper.augmentations[1]
    flip.horizontal, flip.vertical = False, True
    check_other_labels(records, cfg)
    assert not caplog.text


def test_test_boxes_without_keypoints_are_refused_before_the_training(config):
    cfg = config(["left_eye", "right_eye"], lambda data: data["annotations"][2].pop("keypoints"))
    names = {"test": [cfg.dataloader.test.dataset.names]}
    with pytest.raises(UserError, match=r"keypoint AP.*1\.jpg has a box with 0 .*_keypoints=2"):
        prepare_labels(cfg, names)
    cfg.dataloader.evaluator.tasks = ["bbox"]
    prepare_labels(cfg, names)


def test_crowds_without_keypoints_break_the_evaluation_too(config):
    def crowd(data):
        data["annotations"][2].pop("keypoints")
        data["annotations"][2]["iscrowd"] = 1

    cfg = config(["left_eye", "right_eye"], crowd)
    check_other_labels(get_records(cfg.dataloader.train.dataset.names), cfg)
    with pytest.raises(UserError, match=r"1\.jpg has a box with 0 keypoints"):
        prepare_labels(cfg, {"test": [cfg.dataloader.test.dataset.names]})
