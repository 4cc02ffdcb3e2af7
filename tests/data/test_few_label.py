"""Subsets of a labelled data set."""

import pytest
from detectron2.config import LazyCall as L
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog
from omegaconf import DictConfig

from region_pretrain.data.few_label import first_fraction, random_fraction
from region_pretrain.errors import UserError


@pytest.fixture(scope="module", autouse=True)
def data_sets():
    """250 images, of which every fifth has no annotation, and 40 more."""

    def records(prefix, count, empty):
        box = {"bbox": [0, 0, 4, 4], "bbox_mode": 0, "category_id": 0}
        return [
            {"file_name": f"{prefix}{i}.png", "annotations": [] if i % 5 == empty else [box]}
            for i in range(count)
        ]

    DatasetCatalog.register("few_label_a", lambda: records("a", 250, empty=0))
    DatasetCatalog.register("few_label_b", lambda: records("b", 40, empty=None))
    yield
    DatasetCatalog.remove("few_label_a")
    DatasetCatalog.remove("few_label_b")


def numbers(dicts):
    return [int(d["file_name"][1:-4]) for d in dicts]


def test_first_fraction_is_the_head_of_the_filtered_list():
    labelled = [i for i in range(250) if i % 5]
    assert numbers(first_fraction("few_label_a", 0.05)) == labelled[:10]
    assert numbers(first_fraction("few_label_a", 0.05, filter_empty=False)) == list(range(12))
    assert numbers(first_fraction("few_label_a", 1.0)) == labelled


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
    counts = [len(first_fraction("few_label_coco", fraction)) for fraction in (0.05, 0.1)]
    DatasetCatalog.remove("few_label_coco")
    assert counts == [5_863, 11_726]


def test_several_data_sets_are_one_list():
    both = first_fraction(["few_label_a", "few_label_b"], 0.9)
    assert len(both) == 216  # of 240
    assert [d["file_name"] for d in both[199:202]] == ["a249.png", "b0.png", "b1.png"]


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


def test_works_from_a_saved_config(tmp_path):
    cfg = DictConfig({"dataset": L(first_fraction)(names="few_label_b", fraction=0.1)})
    LazyConfig.save(cfg, str(tmp_path / "c.yaml"))
    cfg = LazyConfig.load(str(tmp_path / "c.yaml"))
    assert numbers(instantiate(cfg.dataset)) == [0, 1, 2, 3]
    cfg.dataset.names = ["few_label_b", "few_label_a"]
    assert len(instantiate(cfg.dataset)) == 24
