"""Features of ground-truth boxes, and the hook that classifies them during a run."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.engine import SimpleTrainer
from detectron2.modeling.backbone import FPN
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import roi_align

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.engine.processes import leave_process_group
from region_pretrain.errors import UserError
from region_pretrain.evaluation import knn_probe
from region_pretrain.evaluation.accuracy import accuracy_of
from region_pretrain.evaluation.features import (
    evaluating,
    load_region,
    model_reader,
    read_regions,
)
from region_pretrain.evaluation.knn import knn_classify
from region_pretrain.evaluation.knn_probe import KNNProbeHook
from region_pretrain.modeling.preprocess import Preprocess
from region_pretrain.modeling.trunk import Trunk


def make_detector(input_format="RGB") -> nn.Module:
    torch.manual_seed(0)
    cfg = get_config("common/models/mask_rcnn_fpn_small.py").model
    cfg.input_format = input_format
    cfg.pixel_mean, cfg.pixel_std = [100.0, 110.0, 120.0], [50.0, 60.0, 70.0]
    model = instantiate(cfg)
    with torch.no_grad():  # running statistics that are not those of a new layer
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model


def stock_features(model, dicts, with_head, short_edge, batch_size):
    """The same from Detectron2's own mapper and preprocessing."""
    resize = [T.ResizeShortestEdge(short_edge, max_size=120)] if short_edge else []
    mapper = DatasetMapper(
        is_train=True,  # keeps the annotations; they are not augmented
        augmentations=resize,
        image_format=model.input_format,
    )
    model.eval()
    features, labels = [], []
    for start in range(0, len(dicts), batch_size):
        inputs = [mapper(d) for d in copy.deepcopy(dicts[start : start + batch_size])]
        with torch.no_grad():
            maps = model.backbone(model.preprocess_image(inputs).tensor)
            boxes = [Boxes(x["instances"].gt_boxes.tensor) for x in inputs]
            pooled = model.roi_heads.box_pooler([maps[f"p{i}"] for i in (2, 3, 4, 5)], boxes)
            head = model.roi_heads.box_head
            features.append(head(pooled) if with_head else pooled.flatten(2).mean(2))
        labels += [label for x in inputs for label in x["instances"].gt_classes.tolist()]
    return torch.cat(features), labels


def probed_features(monkeypatch, model, *names, **kwargs) -> dict[str, tuple]:
    """Metric -> what the probe of a model classifies: vectors and labels, those of val if given."""
    found = []

    def classify(*args, k):
        found.append(args)
        return knn_classify(*args, k=k)

    monkeypatch.setattr(knn_probe, "knn_classify", classify)
    hook = KNNProbeHook(0, *names, **kwargs)
    with_trainer(hook, model).before_train()
    monkeypatch.undo()
    return dict(zip(hook.trainer.storage.latest(), found, strict=True))


def with_trainer(hook, model, max_iter=1, start_iter=0):
    """The hook, with as much of a trainer as it needs."""

    class Run:
        storage = EventStorage()

    Run.model, Run.max_iter, Run.start_iter, Run.iter = model, max_iter, start_iter, start_iter
    hook.trainer = Run
    return hook


@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_features_are_the_detectors_own(monkeypatch, names, dicts, with_head, input_format):
    model = make_detector(input_format)
    expected, labels = stock_features(model, dicts, with_head, short_edge=96, batch_size=4)
    found = probed_features(
        monkeypatch, model, "probe_all", batch_size=4, short_edge=96, max_size=120
    )
    features, got_labels = found["probe/knn_head" if with_head else "probe/knn_fpn"]
    assert features.shape == (25, 256 if with_head else 48) and features.dtype == torch.float32
    assert got_labels.dtype == torch.int64
    assert got_labels.tolist() == labels  # without crowds
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)


def _labels(dicts) -> list[int]:
    return [a["category_id"] for d in dicts for a in d["annotations"] if not a["iscrowd"]]


def hook_on(model, **kwargs) -> dict[str, float]:
    """Values that a hook logs before the first step."""
    hook = KNNProbeHook(0, "probe_train", "probe_val", k=5, short_edge=None, **kwargs)
    with_trainer(hook, model).before_train()
    return {name: value for name, (value, _) in hook.trainer.storage.latest().items()}


def knn_top1(features, labels, *test) -> float:
    """Accuracy of 5-NN on test features and labels; without them, on the others of the same set."""
    return accuracy_of(knn_classify(features, labels, *test[:1], k=5), (labels, *test)[-1]).top1


def stock_accuracy(model, train, val, with_head) -> float:
    """kNN accuracy of Detectron2's own features; images are not resized."""
    features = []
    for part in (train, *([val] if val else [])):
        vectors, labels = stock_features(model, part, with_head, short_edge=None, batch_size=8)
        features += [vectors, torch.tensor(labels)]
    return knn_top1(*features)


def trunk_vectors(model, dicts) -> torch.Tensor:
    """The probe's trunk features: one box after the other, one map after the other."""
    pixels = next(m for m in model.modules() if hasattr(m, "pixel_mean"))
    vectors = []
    for record in dicts:
        image, boxes, _ = load_region(record, "RGB")
        image = ((image - pixels.pixel_mean) / pixels.pixel_std).reshape(1, *image.shape)
        height, width = image.shape[-2:]
        if isinstance(model.backbone, FPN):
            image = F.pad(image, (0, -width % 32, 0, -height % 32))
        with torch.no_grad():
            maps = model.eval().backbone.bottom_up(image)
        for box in boxes:
            parts = []
            for name, stride in (("res4", 16), ("res5", 32)):
                pooled = roi_align(maps[name], [box[None]], 7, 1 / stride, aligned=True)
                vector = pooled[0].flatten(1).mean(1)
                parts.append(vector / vector.norm())
            vectors.append(torch.cat(parts))
    return torch.stack(vectors)


def trunk_accuracy(model, dicts) -> float:
    labels = [torch.tensor(_labels(part)) for part in (dicts[:6], dicts[6:])]
    trunk = [trunk_vectors(model, part) for part in (dicts[:6], dicts[6:])]
    return knn_top1(trunk[0], labels[0], trunk[1], labels[1])


def expected_accuracies(model, dicts) -> dict[str, float]:
    return {
        "probe/knn_trunk": trunk_accuracy(model, dicts),
        "probe/knn_fpn": stock_accuracy(model, dicts[:6], dicts[6:], with_head=False),
        "probe/knn_head": stock_accuracy(model, dicts[:6], dicts[6:], with_head=True),
    }


def test_hook_classifies_the_validation_boxes_by_the_training_boxes(names, dicts):
    model = make_detector()
    expected = expected_accuracies(model, dicts)
    assert hook_on(model) == expected
    assert hook_on(model, batch_size=3) == pytest.approx(expected, abs=0.11)  # other padding
    assert expected["probe/knn_fpn"] > 0.5  # colours are easy even for random weights


class Pretraining(nn.Module):
    """Has the detector's modules under the detector's names, as pre-training models have."""

    def __init__(self, detector):
        super().__init__()
        self.backbone = detector.backbone
        self.roi_heads = nn.Module()
        self.roi_heads.box_pooler = detector.roi_heads.box_pooler
        self.roi_heads.box_head = detector.roi_heads.box_head
        mean, std = (v.flatten().tolist() for v in (detector.pixel_mean, detector.pixel_std))
        self.preprocess = Preprocess(mean, std, detector.input_format)


@pytest.mark.parametrize("input_format", ["RGB", "BGR"])
def test_a_pretraining_model_gives_what_its_detector_gives(names, input_format):
    detector = make_detector(input_format)
    model = Pretraining(detector)
    assert hook_on(model) == hook_on(detector)
    full = hook_on(model)
    del model.roi_heads.box_head
    assert hook_on(model) == {k: full[k] for k in ("probe/knn_trunk", "probe/knn_fpn")}
    del model.roi_heads.box_pooler  # the probe's own is the detector's: 7x7, the same levels
    assert hook_on(model) == {k: full[k] for k in ("probe/knn_trunk", "probe/knn_fpn")}
    model.backbone = Trunk(bottom_up=detector.backbone.bottom_up)
    assert list(hook_on(model)) == ["probe/knn_trunk"]


SHAPES_RECIPES = sorted((CONFIG_ROOT.parent / "projects").glob("*/configs/*_shapes.py"))


@pytest.mark.parametrize("recipe", SHAPES_RECIPES, ids=lambda p: p.stem)
def test_every_method_can_be_probed(names, dicts, recipe):
    model = instantiate(LazyConfig.load(str(recipe)).model)
    accuracies = hook_on(model, batch_size=1)
    offers = {"probe/knn_trunk"}
    if isinstance(model.backbone, FPN):
        offers.add("probe/knn_fpn")
    if any(name.startswith("roi_heads.box_head.") for name in split_state(model)[0]):
        offers.add("probe/knn_head")
    assert set(accuracies) == offers
    assert accuracies["probe/knn_trunk"] == trunk_accuracy(model, dicts)


def test_c4_detector(monkeypatch, names):
    model = instantiate(get_config("detection/faster_rcnn_r50_c4_voc.py").model)
    result = hook_on(model)
    assert set(result) == {"probe/knn_trunk", "probe/knn_fpn", "probe/knn_head"}
    found = probed_features(monkeypatch, model, "probe_val", max_images=1, short_edge=None)
    (record,) = DatasetCatalog.get("probe_val")[:1]
    image, boxes, _ = load_region(record, "RGB")
    with torch.no_grad():
        mean, std = model.pixel_mean, model.pixel_std
        maps = model.eval().backbone(((image - mean) / std)[None])
        pooled = model.roi_heads.pooler([maps["res4"]], [Boxes(boxes)])
        expected = model.roi_heads.res5(pooled).mean(dim=(2, 3))
    assert expected.shape == (2, 2048)
    torch.testing.assert_close(found["probe/knn_head"][0], expected, rtol=1e-5, atol=1e-5)


def test_leave_one_out_without_validation_set(names, dicts):
    model = make_detector()
    hook = KNNProbeHook(0, "probe_train", k=5, short_edge=None, max_images=4)
    with_trainer(hook, model).before_train()
    expected = stock_accuracy(model, dicts[:4], None, with_head=False)
    assert hook.probe(model)["probe/knn_fpn"] == expected


def train(dicts, hook) -> tuple:
    """Four iterations of a real detector, whose RPN draws random numbers at each."""
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    model = make_detector()
    mapper = DatasetMapper(
        is_train=True, augmentations=[], image_format="RGB", use_instance_mask=True
    )
    loader = [[mapper(d) for d in copy.deepcopy(dicts[i : i + 2])] for i in range(0, 8, 2)]
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 0.01))
    model.backbone.bottom_up.res2.eval()  # a user's own choice of modes
    modes = {n: m.training for n, m in model.named_modules()}
    trainer.register_hooks([hook] if hook else [])
    trainer.train(0, 4)
    assert {n: m.training for n, m in model.named_modules()} == modes
    random_numbers = random.random(), np.random.rand(), torch.rand(1).item()
    return model.state_dict(), random_numbers, trainer.storage


def test_a_run_with_the_probe_equals_one_without(names, dicts):
    plain, numbers, _ = train(dicts, None)
    hook = KNNProbeHook(2, "probe_train", "probe_val", k=5, short_edge=80, max_size=100)
    probed, same_numbers, storage = train(dicts, hook)
    assert same_numbers == numbers
    assert all(torch.equal(probed[k], v) for k, v in plain.items())
    for name in ("probe/knn_fpn", "probe/knn_head"):
        logged = storage.history(name).values()
        assert [iteration for _, iteration in logged] == [0, 1, 3]  # before the first step, then
        assert all(0 <= value <= 1 for value, _ in logged)


@pytest.mark.parametrize(
    ("period", "start", "logged"), [(0, 0, [0, 4]), (0, 2, [4]), (1, 3, [3, 4])]
)
def test_probes_before_the_first_step_periodically_and_at_the_end(names, period, start, logged):
    hook = KNNProbeHook(period, "probe_train", k=3, short_edge=None, max_images=2)
    run = with_trainer(hook, make_detector(), max_iter=5, start_iter=start).trainer
    run.storage.iter = start
    hook.before_train()
    for run.iter in range(start, 5):
        run.storage.iter = run.iter
        hook.after_step()
    assert [i for _, i in run.storage.history("probe/knn_fpn").values()] == logged


def test_the_first_value_is_that_of_the_untrained_network(names, dicts):
    model = make_detector()
    hook = with_trainer(KNNProbeHook(1, "probe_train", "probe_val", k=5, short_edge=None), model, 2)
    expected = stock_accuracy(model, dicts[:6], dicts[6:], with_head=True)
    hook.before_train()
    hook.after_step()  # after the first step, which iteration 0 does not show
    values = hook.trainer.storage.history("probe/knn_head").values()
    assert values == [(pytest.approx(expected), 0)]


def test_modes_come_back_even_after_an_error(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    module = nn.Sequential(nn.BatchNorm2d(2).eval(), nn.Dropout())
    with pytest.raises(RuntimeError), evaluating(module):
        assert not any(m.training for m in module.modules()) and not torch.is_grad_enabled()
        assert not torch.backends.cudnn.benchmark  # for images of different shapes
        raise RuntimeError
    assert [m.training for m in module.modules()] == [True, False, True]
    assert torch.is_grad_enabled() and torch.backends.cudnn.benchmark


def test_bad_input_is_reported_before_the_first_step(names):
    model = make_detector()
    records = [{"file_name": "x.png", "image_id": 0}, {"file_name": "y.png", "annotations": []}]
    crowds = [{"file_name": "x.png", "image_id": 0, "annotations": [{"iscrowd": 1}]}]
    for unlabelled in ([], records, records[1:], crowds):
        DatasetCatalog.register("probe_unlabelled", lambda given=unlabelled: given)
        hook = with_trainer(KNNProbeHook(1, "probe_unlabelled"), model, start_iter=3)
        with pytest.raises(UserError, match="probe_unlabelled has none"):
            hook.before_train()
        DatasetCatalog.remove("probe_unlabelled")
    for name, value in {"k": 0, "max_images": 0, "batch_size": 0, "period": -1}.items():
        with pytest.raises(UserError, match=f"{name}={value}, which must be at least"):
            KNNProbeHook(**{"period": 9, "train_names": "probe_train", name: value})
    hook = with_trainer(KNNProbeHook(9, "probe_train"), model)
    hook.trainer.log_period = 10
    with pytest.raises(UserError, match="period=9, but metrics are written every train.log_period"):
        hook.before_train()
    with pytest.raises(UserError, match="no pixel_mean in Module"):
        bare = nn.Module()
        bare.backbone, bare.roi_heads = model.backbone, model.roi_heads
        hook_on(bare)


def worker(rank: int, folder: str, dicts: list) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/store", world_size=2, rank=rank)
    DatasetCatalog.register("probe_train", lambda: dicts[:6])
    DatasetCatalog.register("probe_val", lambda: dicts[6:7])  # one process has no image
    hook = KNNProbeHook(0, "probe_train", "probe_val", k=5, short_edge=None, batch_size=1)
    probed = make_detector()
    norms = [m for m in probed.modules() if isinstance(m, _BatchNorm)]
    assert norms
    for norm in norms:
        norm.running_mean += rank  # the probe uses those of the first process
    with_trainer(hook, probed).before_train()
    values = {name: value for name, (value, _) in hook.trainer.storage.latest().items()}
    model = make_detector()
    reader = model_reader(model)
    regions = [read_regions(model, reader, dicts, batch_size=n) for n in (1, 3, 20)]
    torch.save((values, [tuple(r) for r in regions]), f"{folder}/{rank}.pt")
    leave_process_group()


def test_two_processes_share_the_images(tmp_path, dicts):
    mp.spawn(worker, args=(str(tmp_path), dicts), nprocs=2)
    (first, regions), (second, others) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    DatasetCatalog.register("probe_train", lambda: dicts[:6])
    DatasetCatalog.register("probe_val", lambda: dicts[6:7])
    alone = hook_on(make_detector(), batch_size=1)
    DatasetCatalog.remove("probe_train")
    DatasetCatalog.remove("probe_val")
    assert first == second == alone and len(alone) == 3
    # The order of the regions and the padding of the batches are those of one process.
    model = make_detector()
    for size, mine, other in zip((1, 3, 20), regions, others, strict=True):
        features, labels, images = read_regions(model, model_reader(model), dicts, batch_size=size)
        assert mine[1].tolist() == other[1].tolist() == labels.tolist() == _labels(dicts)
        assert mine[2].tolist() == other[2].tolist() == images.tolist()
        assert images.tolist() == [n for n in range(10) for _ in range(2 + n % 2)]
        for level, values in features.items():
            torch.testing.assert_close(mine[0][level], values, rtol=1e-5, atol=1e-6)
            assert torch.equal(mine[0][level], other[0][level])


@pytest.mark.parametrize("classes", [["red", "blue", "green"], ["red", "green"]])
def test_data_sets_of_other_classes_are_refused(names, classes):
    found = dict(zip(names, (["red", "green", "blue"], classes), strict=True))
    try:
        for name, its in found.items():
            MetadataCatalog.get(name).thing_classes = its
        hook = with_trainer(KNNProbeHook(0, *names, short_edge=None), make_detector())
        with pytest.raises(UserError, match="probe_train and probe_val differ: .*class [12] is"):
            hook.before_train()
    finally:
        for name in names:
            MetadataCatalog.remove(name)
