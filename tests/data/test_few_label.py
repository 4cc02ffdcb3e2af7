"""Subsets of a labelled data set."""

import json
from pathlib import Path

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, get_detection_dataset_dicts
from omegaconf import DictConfig

from region_pretrain.config import load_config
from region_pretrain.data.few_label import (
    first_fraction,
    listed_images,
    random_fraction,
    write_subset,
)
from region_pretrain.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def data_sets():
    """250 images, of which every fifth has no annotation, and 40 more."""

    def records(prefix, count, empty):
        box = {"bbox": [0, 0, 4, 4], "bbox_mode": 0, "category_id": 0}
        return [
            {
                "file_name": f"photos/{prefix}/{prefix}{i}.png",
                "image_id": 1000 * (prefix == "b") + i,
                "annotations": [] if i % 5 == empty else [box],
            }
            for i in range(count)
        ]

    DatasetCatalog.register("few_label_a", lambda: records("a", 250, empty=0))
    DatasetCatalog.register("few_label_b", lambda: records("b", 40, empty=None))
    yield
    DatasetCatalog.remove("few_label_a")
    DatasetCatalog.remove("few_label_b")


def numbers(dicts):
    return [int(Path(d["file_name"]).stem[1:]) for d in dicts]


def test_first_fraction_is_the_head_of_the_filtered_list():
    labelled = [i for i in range(250) if i % 5]
    assert numbers(first_fraction("few_label_a", 0.05)) == labelled[:10]
    assert numbers(first_fraction("few_label_a", 0.05, filter_empty=False)) == list(range(12))
    assert numbers(first_fraction("few_label_a", 1.0)) == labelled
    assert len(labelled) * 0.29 < 58  # 57.99999999999999
    assert numbers(first_fraction("few_label_a", 0.29)) == labelled[:58]
    assert len(random_fraction("few_label_a", 0.29, seed=0)) == 58


@pytest.mark.parametrize(
    ("fraction", "count"), [(0.05, 2), (0.075, 3), (0.099, 3), (0.29, 11), (0.7, 28), (1e-9, 1)]
)
def test_counts_are_rounded_down_to_at_least_one(fraction, count):
    # 0.7 * 40 is 28.000000000000004 and 0.075 * 40 is 3.0
    assert len(first_fraction("few_label_b", fraction)) == count
    assert len(random_fraction("few_label_b", fraction, seed=0)) == count


def test_counts_of_coco():
    """train2017 has 117,266 images with annotations; the subsets are 5,863 and 11,726."""
    DatasetCatalog.register("few_label_coco", lambda: [{"file_name": ""}] * 117_266)
    fractions = (0.01, 0.02, 0.05, 0.1)
    counts = [len(first_fraction("few_label_coco", fraction)) for fraction in fractions]
    DatasetCatalog.remove("few_label_coco")
    assert counts == [1_172, 2_345, 5_863, 11_726]


def test_several_data_sets_are_one_list():
    both = first_fraction(["few_label_a", "few_label_b"], 0.9)
    assert len(both) == 216  # of 240
    assert [Path(d["file_name"]).name for d in both[199:202]] == ["a249.png", "b0.png", "b1.png"]


def test_random_fractions_are_repeatable_nested_and_in_order():
    small = numbers(random_fraction("few_label_a", 0.1, seed=3))
    large = numbers(random_fraction("few_label_a", 0.5, seed=3))
    assert small == numbers(random_fraction("few_label_a", 0.1, seed=3))
    assert len(small) == 20 and len(large) == 100
    assert set(small) < set(large)
    assert small == sorted(small) and large == sorted(large)
    assert small != numbers(random_fraction("few_label_a", 0.1, seed=4))
    assert small != numbers(first_fraction("few_label_a", 0.1))
    assert max(large) > 200  # from the whole list
    assert not any(i % 5 == 0 for i in large)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(UserError, match=f"fraction={fraction} of few_label_a: must be above 0"):
        first_fraction("few_label_a", fraction)
    with pytest.raises(UserError, match="at most 1"):
        random_fraction("few_label_a", fraction, seed=0)


def test_a_fraction_or_seed_that_is_no_number_is_refused():
    with pytest.raises(UserError, match="^fraction=5% of few_label_a: must be above 0"):
        first_fraction("few_label_a", "5%")
    for seed in ("x", 0.5, -1, None):
        with pytest.raises(UserError, match=f"^seed={seed}: must be a whole number, at least 0"):
            random_fraction("few_label_a", 0.5, seed=seed)


def test_data_without_boxes_is_named():
    DatasetCatalog.register("few_empty", lambda: [{"file_name": "x", "annotations": []}])
    try:
        with pytest.raises(UserError, match="few_empty: No valid data found in few_empty"):
            random_fraction("few_empty", 0.5, seed=0)
    finally:
        DatasetCatalog.remove("few_empty")


def test_works_from_a_saved_config(tmp_path):
    cfg = DictConfig({"dataset": L(first_fraction)(names="few_label_b", fraction=0.1)})
    LazyConfig.save(cfg, str(tmp_path / "c.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "c.yaml"))
    assert numbers(instantiate(cfg.dataset)) == [0, 1, 2, 3]
    cfg.dataset.names = ["few_label_b", "few_label_a"]
    assert len(instantiate(cfg.dataset)) == 24


def split_file(folder, content, name="split.json"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "listed",
    [
        [7, 3, 11],
        ["7", "3", "11"],
        ["a7.png", "a/a3.png", "photos/a/a11.png"],
        {"images": [{"id": i, "file_name": f"a{i}.png"} for i in (7, 3, 11)], "annotations": []},
        {"images": [{"id": 10 * i, "file_name": f"a{i}.png"} for i in (7, 3, 11)]},
        {"image_ids": [7, 3, 11], "file_names": ["a7.png", "a3.png", "a11.png"]},
    ],
    ids=["ids", "text ids", "file names", "COCO", "COCO with other ids", "labelled_images"],
)
def test_split_files_of_one_list(tmp_path, listed):
    path = split_file(tmp_path, listed, "instances_train2017.1@10.json")
    assert numbers(listed_images("few_label_a", path)) == [3, 7, 11]


def test_empty_images_of_a_split_are_dropped_like_detectron2_does(tmp_path):
    path = split_file(tmp_path, [0, 1, 5, 6])  # 0 and 5 have no annotation
    assert numbers(listed_images("few_label_a", path)) == [1, 6]
    assert numbers(listed_images("few_label_a", path, filter_empty=False)) == [0, 1, 5, 6]


def test_unbiased_teachers_positions(tmp_path):
    """Positions in the list without empty images, for each percentage and seed."""
    path = split_file(
        tmp_path,
        {"1.0": {"0": [5, 199], "1": [0, 6]}, "2.0": {"1": [4, 8, 3, 9]}},
        "COCO_supervision.txt",
    )
    labelled = get_detection_dataset_dicts("few_label_a")
    assert len(labelled) == 200
    found = listed_images("few_label_a", path, fraction=0.02, seed=1)
    assert found == [labelled[i] for i in (3, 4, 8, 9)]
    assert numbers(listed_images("few_label_a", path, 0.01, 0)) == [7, 249]
    for options, message in [
        ({}, r"fraction is not set; it has fraction 0\.01, 0\.02$"),
        ({"fraction": 0.1, "seed": 0}, r"no fraction=0\.1; it has fraction 0\.01, 0\.02$"),
        ({"fraction": 0.02, "seed": 0}, r"no seed=0; it has seed 1$"),
        ({"fraction": 0.02}, r"seed is not set; it has seed 1$"),
    ]:
        with pytest.raises(UserError, match=message):
            listed_images("few_label_a", path, **options)
    # 2 % of 250 images are 5: the file was made without the empty ones
    with pytest.raises(UserError, match="4 positions up to 9 for 2 %, but 2 % of the 250 images"):
        listed_images("few_label_a", path, 0.02, 1, filter_empty=False)
    by_name = split_file(tmp_path, {"5": {"0": ["a9.png"]}, "10": ["a8.png", "a7.png"]})
    assert numbers(listed_images("few_label_a", by_name, 0.05, 0)) == [9]
    assert numbers(listed_images("few_label_a", by_name, 0.1)) == [7, 8]


def test_the_file_can_be_chosen_by_percent_and_seed(tmp_path):
    for seed, percent in [(1, 10), (2, 10), (1, 2)]:
        split_file(tmp_path, [4 * seed + percent], f"x.{seed}@{percent}.json")
    template = str(tmp_path / "x.{seed}@{percent}.json")
    assert numbers(listed_images("few_label_a", template, 0.1, 2)) == [18]
    assert numbers(listed_images("few_label_a", template, 0.02, 1)) == [6]
    with pytest.raises(UserError, match=r"no such split file: .*x\.3@10\.json"):
        listed_images("few_label_a", template, 0.1, 3)
    with pytest.raises(UserError, match=r"is a single split: remove fraction=0\.1 and seed=1"):
        listed_images("few_label_a", str(tmp_path / "x.1@10.json"), 0.1, 1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 999, 998], r"2 of 3 images are not in few_label_a, e\.g\. 999, 998: use the data set"),
        (["a1.png", "other/a1.png"], "1 of 2 images are not in few_label_a, e.g. 'other/a1.png'"),
        # ids 1 and 2 of another data set
        ({"images": [{"id": 1, "file_name": "x.png"}]}, r"x\.png \(id 1\): use the data set"),
        ("[1, 2", "is not JSON"),
        ([], "lists no images"),
        ({"a": [1]}, "lists no images"),
        ([1.5], "1.5 is not an image id or a file name"),
    ],
)
def test_unsuitable_splits_are_refused_in_one_line(tmp_path, content, message):
    with pytest.raises(UserError, match=message) as error:
        listed_images("few_label_a", split_file(tmp_path, content))
    assert "\n" not in str(error.value)


def test_an_ambiguous_image_is_refused(tmp_path):
    box = {"bbox": [0, 0, 4, 4], "bbox_mode": 0, "category_id": 0}
    twice = [{"file_name": f"/data/{d}/1.png", "image_id": 1, "annotations": [box]} for d in "xy"]
    DatasetCatalog.register("few_label_twice", lambda: twice)
    try:
        with pytest.raises(UserError, match="1 matches 2 images of few_label_twice, e.g. /data/x"):
            listed_images("few_label_twice", split_file(tmp_path, [1]))
        (found,) = listed_images("few_label_twice", split_file(tmp_path, ["y/1.png"]))
        assert found["file_name"] == "/data/y/1.png"
        subset = random_fraction("few_label_twice", 0.5, seed=0)
        assert subset.selection["file_names"] == ["/".join(subset[0]["file_name"].split("/")[-2:])]
        write_subset(subset, str(tmp_path))
        again = listed_images("few_label_twice", str(tmp_path / "labelled_images.json"))
        assert again == subset
    finally:
        DatasetCatalog.remove("few_label_twice")


def test_the_selected_images_are_written_and_read_again(tmp_path):
    subset = random_fraction(["few_label_a", "few_label_b"], 0.025, seed=5)
    write_subset(subset, str(tmp_path))
    content = json.loads((tmp_path / "labelled_images.json").read_text())
    assert content == {
        "datasets": ["few_label_a", "few_label_b"],
        "fraction": 0.025,
        "seed": 5,
        "split": None,
        "image_ids": [d["image_id"] for d in subset],
        "file_names": [Path(d["file_name"]).name for d in subset],
    }
    assert len(content["image_ids"]) == 6
    again = listed_images(["few_label_a", "few_label_b"], str(tmp_path / "labelled_images.json"))
    assert again == subset
    assert again.selection["split"] == "labelled_images.json"
    write_subset(list(subset), str(tmp_path / "no folder"))  # not a subset: nothing to write


def test_a_split_is_one_override_of_a_detection_config(tmp_path):
    path = split_file(tmp_path, [3, 4], "instances_train2017.1@10.json")
    dataset = "dataloader.train.dataset"
    for split in (path, str(tmp_path / "instances_train2017.{seed}@{percent}.json")):
        cfg = load_config(
            "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
            [
                f"{dataset}._target_=region_pretrain.data.few_label.listed_images",
                f"{dataset}.names=few_label_a",
                f"{dataset}.min_keypoints=0",
                f"+{dataset}.split={split}",
                *([] if split == path else [f"+{dataset}.fraction=0.1", f"+{dataset}.seed=1"]),
            ],
        )
        assert numbers(instantiate(cfg.dataloader.train.dataset)) == [3, 4]


def test_options_of_detectron2_are_kept(tmp_path):
    """Person keypoint detectors train on images with enough visible keypoints."""

    def record(i, visible):
        box = {"bbox": [0, 0, 4, 4], "bbox_mode": 0, "category_id": 0}
        keypoints = [1, 1, 2] * visible + [0, 0, 0] * (3 - visible)
        annotations = [{**box, "keypoints": keypoints}]
        return {"file_name": f"k{i}.png", "image_id": i, "annotations": annotations}

    DatasetCatalog.register("few_label_k", lambda: [record(i, i % 4) for i in range(8)])
    path = split_file(tmp_path, [0, 1, 2, 3])
    try:
        assert numbers(first_fraction("few_label_k", 0.5, min_keypoints=2)) == [2, 3]
        assert len(random_fraction("few_label_k", 1.0, seed=0, min_keypoints=3)) == 2
        assert numbers(listed_images("few_label_k", path, min_keypoints=1)) == [1, 2, 3]
    finally:
        DatasetCatalog.remove("few_label_k")
