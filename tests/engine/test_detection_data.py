import itertools
import json
import os
import re

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    DatasetMapper,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from detectron2.utils.registry import locate
from omegaconf import OmegaConf
from PIL import Image
from tiny_run import Loader, NoisyMapper, records

from region_pretrain.data.few_label import ImageSubset
from region_pretrain.engine.detection_data import (
    DetectionTrainData,
    build_test_loader,
    check_image_files,
    detection_training_data,
)
from region_pretrain.errors import UserError
from region_pretrain.images import tolerated_files


def make(**options):
    options = {"total_batch_size": 4, "num_workers": 0, "seed": 3, **options}
    return DetectionTrainData(records(), NoisyMapper(), **options)


def flat(batches):
    return [[(d["image_id"], d["x"].tolist()) for d in batch] for batch in batches]


def test_batches_contain_what_detectron2_loads():
    loader = build_detection_train_loader(
        records(), mapper=lambda d: d, sampler=TrainingSampler(10, seed=3), total_batch_size=4
    )
    theirs = [[d["image_id"] for d in b] for b in itertools.islice(loader, 12)]
    ours = [[d["image_id"] for d in b] for b in make().iterate(0, 12)]
    assert ours == theirs
    for batch in ours:  # tall ones among themselves
        assert len({i % 3 == 0 for i in batch}) == 1


@pytest.mark.parametrize("start", [1, 5, 11])
def test_a_resumed_run_sees_the_same_batches(start):
    assert flat(make().iterate(start, 12)) == flat(make().iterate(0, 12))[start:]


def test_workers_do_not_change_the_batches():
    assert flat(make(num_workers=2).iterate(2, 6)) == flat(make().iterate(2, 6))


def test_loading_leaves_the_models_random_numbers_alone():
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    list(make().iterate(0, 3))
    assert (torch.rand(1), np.random.rand()) == expected


def test_an_image_is_augmented_anew_each_time():
    seen = [x for batch in flat(make().iterate(0, 20)) for i, x in batch if i == 4]
    assert len(seen) > 4 and len({tuple(x) for x in seen}) == len(seen)


def test_another_seed_is_another_order():
    assert flat(make(seed=4).iterate(0, 3)) != flat(make().iterate(0, 3))


def test_processes_share_a_batch(monkeypatch):
    whole = {i: [d["image_id"] for d in b] for i, b in enumerate(make_plain().iterate(0, 5))}
    shares = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        shares.append([[d["image_id"] for d in b] for b in make_plain().iterate(0, 5)])
    for t, batch in whole.items():
        mixed = [i for pair in zip(shares[0][t], shares[1][t], strict=True) for i in pair]
        assert mixed == batch


def make_plain():
    return make(aspect_ratio_grouping=False)


def test_a_mapper_may_reject_a_record():
    def odd_only(record):
        return record if record["image_id"] % 2 else None

    data = DetectionTrainData(records(), odd_only, 4, seed=0)
    assert all(d["image_id"] % 2 for batch in data.iterate(0, 6) for d in batch)
    data = DetectionTrainData(records(), lambda record: None, 4)
    with pytest.raises(UserError, match="rejected 100 records in a row"):
        list(data.iterate(0, 1))


def lazy(**options):
    cfg = L(build_detection_train_loader)(
        dataset=L(records)(), mapper=L(NoisyMapper)(), total_batch_size=4, num_workers=0, **options
    )
    return OmegaConf.create({"train": cfg}, flags={"allow_objects": True}).train


def test_detectron2s_lazy_loader_is_read():
    data = detection_training_data(lazy(), seed=3)
    assert (data.total_batch_size, data.iterations_per_epoch) == (4, 2)
    assert flat(data.iterate(2, 5)) == flat(make().iterate(2, 5))


def test_the_saved_form_of_a_config_is_read_too():
    cfg = lazy()
    cfg._target_ = "detectron2.data.build_detection_train_loader"
    assert flat(detection_training_data(cfg, seed=3).iterate(2, 5)) == flat(make().iterate(2, 5))


def test_a_sampler_of_the_config_is_used():
    sampler = L(RepeatFactorTrainingSampler)(repeat_factors=torch.ones(10) * 2, seed=1)
    data = detection_training_data(lazy(sampler=sampler, aspect_ratio_grouping=False), seed=3)
    ids = [d["image_id"] for batch in data.iterate(0, 5) for d in batch]
    assert sorted(ids) == sorted(list(range(10)) * 2)  # an epoch contains each image twice


def test_other_loaders_are_taken_as_they_are(caplog):
    cfg = OmegaConf.create(L(Loader)(total_batch_size=4), flags={"allow_objects": True})
    data = detection_training_data(cfg, seed=0)
    assert data.iterations_per_epoch == 10 and len(list(data.iterate(3, 5))) == 2
    cfg = OmegaConf.create({"_target_": "builtins.dict", "total_batch_size": 2})
    data = detection_training_data(cfg, seed=0)
    assert list(data.iterate(7, 8)) == ["total_batch_size"]
    assert "restarts its order" in caplog.text
    with pytest.raises(UserError, match="total_batch_size"):
        detection_training_data(OmegaConf.create({"_target_": "builtins.dict"}), seed=0)


LOADED = []


def counted_records() -> list[dict]:
    LOADED.append(1)
    return records()


def test_data_with_a_loader_of_other_fields_is_loaded_once():
    LOADED.clear()
    cfg = lazy(collate_fn=L(locate)(name="builtins.tuple"))
    cfg.dataset = L(counted_records)()
    data = detection_training_data(cfg, seed=3)
    (batch,) = data.iterate(0, 1)
    assert isinstance(batch, tuple) and len(batch) == 4 and len(LOADED) == 1


def test_an_empty_data_set_is_refused():
    with pytest.raises(UserError, match="dataset is empty"):
        DetectionTrainData([], NoisyMapper(), 4)


def files(folder, count: int = 10) -> list[dict]:
    """Records of 16-bit images; the pixels of image i are 256 i."""
    paths = [str(folder / f"{i}.png") for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(np.full((3, 4), 256 * i, np.uint16)).save(path)
    return [
        {"file_name": path, "image_id": i, "width": 4, "height": 3} for i, path in enumerate(paths)
    ]


def damage(record: dict) -> None:
    with open(record["file_name"], "r+b") as file:
        file.truncate(40)


def lazy_files(some: list[dict], num_workers: int = 0):
    cfg = L(build_detection_train_loader)(
        dataset=L(json.loads)(s=json.dumps(some)),
        mapper=L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR"),
        total_batch_size=5,
        num_workers=num_workers,
    )
    return OmegaConf.create({"train": cfg}, flags={"allow_objects": True}).train


def ids(data, start: int = 0, stop: int = 4) -> list[list[int]]:
    return [[d["image_id"] for d in batch] for batch in data.iterate(start, stop)]


@pytest.mark.parametrize("workers", [0, 2])
def test_fine_tuning_sees_the_pixels_of_pre_training(tmp_path, workers):
    some = files(tmp_path)
    some[4]["reading"] = {"bits": 11}  # 1024 of 2047
    data = detection_training_data(lazy_files(some, workers), seed=3)
    seen = {d["image_id"]: d["image"] for batch in data.iterate(0, 2) for d in batch}
    assert {i: x.unique().tolist() for i, x in seen.items()} == {
        i: [i if i != 4 else 128] for i in range(10)
    }


def test_other_loaders_of_a_mapper_see_them_too(tmp_path):
    mapper = L(DatasetMapper)(is_train=True, augmentations=[], image_format="BGR")
    loader = L(MapperLoader)(mapper=mapper, total_batch_size=1, records=files(tmp_path))
    data = detection_training_data(
        OmegaConf.create({"train": loader}, flags={"allow_objects": True}).train, seed=0
    )
    assert [int(d["image"].max()) for (d,) in data.iterate(0, 10)] == list(range(10))


class MapperLoader:
    """An iterable of batches that the engine does not know."""

    def __init__(self, mapper, total_batch_size, records):
        self.mapper, self.records = mapper, records

    def __iter__(self):
        return ([self.mapper(record)] for record in self.records)


def test_a_broken_image_is_named_and_replaced_by_the_next(tmp_path, caplog):
    some = files(tmp_path)
    whole = ids(detection_training_data(lazy_files(some), seed=3))
    damage(some[6])
    data = detection_training_data(lazy_files(some), seed=3)
    found = ids(data)
    assert found == [[7 if i == 6 else i for i in batch] for batch in whole]
    assert any(6 in batch for batch in whole)
    (warning,) = [r.getMessage() for r in caplog.records if "replaced by the next" in r.message]
    assert some[6]["file_name"] in warning
    for start in (1, 3):  # a resumed run sees the same batches
        assert ids(detection_training_data(lazy_files(some), seed=3), start) == found[start:]


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_broken_images_end_the_run(tmp_path, workers):
    some = files(tmp_path)
    for i in (2, 3, 6, 7):
        damage(some[i])
    data = detection_training_data(lazy_files(some), seed=3, max_unreadable=0.4)
    assert {i for batch in ids(data) for i in batch} == {0, 1, 4, 5, 8, 9}
    data = detection_training_data(lazy_files(some, workers), seed=3, max_unreadable=0.39)
    message = "4 of 10 training images are unreadable, but train.max_unreadable tolerates 3: "
    with pytest.raises(UserError, match=message) as caught:
        ids(data, 0, 40)
    assert "\n" not in str(caught.value)
    for i in (2, 3, 6, 7):
        assert some[i]["file_name"] in str(caught.value)


@pytest.mark.parametrize(
    ("count", "fraction", "tolerated"),
    [(1000, 0.01, 10), (30, 0.01, 1), (30, 0, 0), (2, 1, 2)],
)
def test_tolerated_number_of_files(count, fraction, tolerated):
    assert tolerated_files(count, fraction, "key") == tolerated


def test_the_tolerated_fraction_is_checked(tmp_path):
    with pytest.raises(UserError, match="train.max_unreadable=3: must be a fraction"):
        detection_training_data(lazy_files(files(tmp_path)), seed=0, max_unreadable=3)


def test_missing_files_are_found_at_the_start(tmp_path, caplog):
    some = files(tmp_path)
    os.remove(some[8]["file_name"])
    detection_training_data(lazy_files(some), seed=0)  # one is tolerated
    message = f"dataloader.train: 1 of 10 image files do not exist, e.g. {some[8]['file_name']}"
    assert message in caplog.text
    os.remove(some[3]["file_name"])
    message = message.replace("1 of", "2 of").replace("8.png", "3.png")
    with pytest.raises(UserError, match=re.escape(message)):
        detection_training_data(lazy_files(some), seed=0)
    message = message.replace("train", "test")
    with pytest.raises(UserError, match=re.escape(message)):
        build_test_loader(lazy_test(some))


def test_a_large_data_set_is_checked_in_places(monkeypatch):
    asked = []
    monkeypatch.setattr(os.path, "exists", lambda path: asked.append(path) or path != "99999")
    with pytest.raises(UserError, match="x: 1 of 4000 checked image files do not exist, .*99999"):
        check_image_files([{"file_name": str(i)} for i in range(100_000)], "x")
    numbers = sorted(map(int, asked))
    assert numbers[0] == 0 and set(np.diff(numbers)) == {25, 26}
    records = [{"file_name": str(i)} for i in range(100_000)]
    check_image_files(records, "x", tolerated=25)  # 1 of 4000 stands for 25 of 100000
    with pytest.raises(UserError, match="1 of 4000 checked"):
        check_image_files(records, "x", tolerated=24)
    asked.clear()
    check_image_files([{"file_name": "s3://bucket/a.png"}, {"image_id": 1}], "x")
    assert not asked


def lazy_test(some: list[dict], workers: int = 0):
    cfg = L(build_detection_test_loader)(
        dataset=L(json.loads)(s=json.dumps(some)),
        mapper=L(DatasetMapper)(is_train=False, augmentations=[], image_format="RGB"),
        num_workers=workers,
    )
    return OmegaConf.create({"test": cfg}, flags={"allow_objects": True}).test


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_the_same_pixels_and_names_a_broken_image(tmp_path, workers):
    some = files(tmp_path)
    batches = list(build_test_loader(lazy_test(some, workers)))
    assert [d["image"].unique().tolist() for (d,) in batches] == [[i] for i in range(10)]
    damage(some[7])
    with pytest.raises(UserError) as caught:
        list(build_test_loader(lazy_test(some, workers)))
    assert str(caught.value).startswith(some[7]["file_name"]) and "\n" not in str(caught.value)


def test_broken_test_images_are_found_before_the_training(tmp_path):
    some = files(tmp_path)
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)).save(photo)
    some.append({"file_name": str(photo), "image_id": 10, "width": 60, "height": 40})
    build_test_loader(lazy_test(some), read_images=True)
    photo.write_bytes(photo.read_bytes()[:-400])
    damage(some[7])
    message = f"dataloader.test: 2 of 11 images cannot be evaluated: {some[7]['file_name']}: "
    with pytest.raises(UserError, match=re.escape(message)):
        build_test_loader(lazy_test(some), read_images=True)
    build_test_loader(lazy_test(some))


@pytest.mark.parametrize("part", ["dataset", "mapper", "sampler"])
def test_an_argument_that_a_part_of_a_loader_lacks_is_named(tmp_path, part):
    cfg = lazy(sampler=L(TrainingSampler)(size=10))
    cfg[part].flip = True
    message = rf"^dataloader.train.{part}: .* argument 'flip': remove it from the config"
    with pytest.raises(UserError, match=message):
        detection_training_data(cfg, seed=3)
    cfg = lazy_test(files(tmp_path))
    if part in cfg:
        cfg[part].flip = True
        with pytest.raises(UserError, match=message.replace("train", "test")):
            build_test_loader(cfg)


def test_a_part_of_the_test_data_is_refused(tmp_path):
    """Detectron2's evaluators compare with all images of the json."""
    cfg = lazy_test(files(tmp_path))
    cfg.dataset = L(ImageSubset)(names=["x"], dicts=cfg.dataset, chosen=[0, 2])
    with pytest.raises(UserError) as error:
        build_test_loader(cfg)
    assert str(error.value) == (
        "dataloader.test.dataset is a part of a data set, but evaluators count the objects of all "
        "its images as missed: write these images and their boxes to a json of their own, and name "
        "it (coco://ANN.json?images=DIR)"
    )


def test_a_size_that_contradicts_the_file_ends_the_run(tmp_path):
    some = files(tmp_path)
    some[5].update(width=8, height=6)
    with pytest.raises(UserError, match=r"5\.png is 4x3, but its annotations are for 8x6"):
        ids(detection_training_data(lazy_files(some), seed=3))


def test_a_data_set_of_unreadable_images_says_why(tmp_path):
    some = files(tmp_path)
    for record in some:
        damage(record)
    data = detection_training_data(lazy_files(some), seed=3, max_unreadable=1)
    with pytest.raises(
        UserError, match=r"rejected 100 records in a row; unreadable: .*\.png: not an i"
    ):
        ids(data)


def test_test_images_that_the_training_sees_are_warned_of(tmp_path, caplog):
    """Of a part of a data set, only its own images count; paths may lead through links."""
    (tmp_path / "pool").mkdir()
    some = [{**record, "width": 8, "height": 8} for record in files(tmp_path / "pool")]
    (tmp_path / "link").symlink_to(tmp_path / "pool")
    cfg = lazy_files(some)
    cfg.dataset = L(ImageSubset)(names=["pool"], dicts=cfg.dataset, chosen=[0, 1, 2, 3])
    data = detection_training_data(cfg, seed=3)
    linked = [{**r, "file_name": r["file_name"].replace("/pool/", "/link/")} for r in some]
    build_test_loader(lazy_test(linked[4:]), False, data.files)
    build_test_loader(lazy_test(linked))
    assert "the training sees" not in caplog.text
    build_test_loader(lazy_test(linked[2:]), False, data.files)
    assert [message for message in caplog.messages if "the training sees" in message] == [
        f"dataloader.test: the training sees 2 of the 8 images, e.g. {some[2]['file_name']}, so "
        "their AP says little about others"
    ]
