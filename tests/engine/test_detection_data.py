import itertools

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.data import build_detection_train_loader
from detectron2.data.samplers import RepeatFactorTrainingSampler, TrainingSampler
from detectron2.utils import comm
from omegaconf import OmegaConf
from tiny_run import Loader, NoisyMapper, records

from region_pretrain.engine.detection_data import DetectionTrainData, detection_training_data
from region_pretrain.errors import UserError


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


def test_an_empty_data_set_is_refused():
    with pytest.raises(UserError, match="dataset is empty"):
        DetectionTrainData([], NoisyMapper(), 4)
