"""A converted config computes what Detectron2's DefaultTrainer does with the yacs config."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode, instantiate
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    get_detection_dataset_dicts,
)
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils.env import seed_all_rng
from torch import nn
from zoo import SMALL

from region_pretrain.config import load_config, to_yaml
from region_pretrain.engine.build import build_model, build_optimizer, clipping
from region_pretrain.engine.detection_data import detection_training_data
from region_pretrain.engine.finetune import do_train
from region_pretrain.errors import UserError
from region_pretrain.yacs import find_config_file, read_yacs
from region_pretrain.yacs.build import build_evaluator

MASK_FPN = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
FASTER_FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
KEYPOINT = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
ZOO = [
    FASTER_FPN,
    "COCO-Detection/faster_rcnn_R_50_C4_3x.yaml",
    "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    MASK_FPN,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
    KEYPOINT,
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
]


def both(name: str, coco: str, *overrides: str) -> tuple[CfgNode, object]:
    """The yacs config for Detectron2, and the converted one for us, saved and loaded again."""
    of_yacs = [*SMALL, f"DATASETS.TRAIN={coco}", f"DATASETS.TEST={coco}", "MODEL.DEVICE=cpu"]
    if "eypoint" in name:
        of_yacs += ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS=3", "MODEL.ROI_HEADS.NUM_CLASSES=1"]
    of_yacs += overrides
    return read_yacs(find_config_file(name), of_yacs), load_config(name, of_yacs)


@pytest.fixture
def reloaded(tmp_path):
    def reload(cfg):
        path = tmp_path / "config.yaml"
        path.write_text(to_yaml(cfg))
        return load_config(str(path))

    return reload


def hyperparameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: {k: v for k, v in group.items() if k not in ("params", "foreach")}
        for group in optimizer.param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ZOO)
def test_model_optimizer_schedule_data_and_evaluator(name, coco, reloaded):
    yacs, cfg = both(name, coco)
    cfg = reloaded(cfg)

    seed_all_rng(0)
    theirs = DefaultTrainer.build_model(yacs)
    ours = build_model(cfg, torch.device("cpu"))
    assert type(ours) is type(theirs)
    state = theirs.state_dict()
    assert ours.state_dict().keys() == state.keys()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, state[key]), key

    stock = DefaultTrainer.build_optimizer(yacs, theirs)
    mine = build_optimizer(cfg, ours, cfg.optimizer.lr)
    assert type(mine) is torch.optim.SGD
    assert hyperparameters(ours, mine) == hyperparameters(theirs, stock)

    DefaultTrainer.build_lr_scheduler(yacs, stock)
    multiplier = instantiate(cfg.lr_multiplier)
    LRMultiplier(mine, multiplier, cfg.train.max_iter)
    assert [g["lr"] for g in mine.param_groups] == [g["lr"] for g in stock.param_groups]

    compare_samples(yacs, cfg)
    evaluator = instantiate(cfg.dataloader.evaluator)
    assert type(evaluator) is COCOEvaluator
    assert [r["image_id"] for b in instantiate(cfg.dataloader.test) for r in b] == [*range(6)]


def compare_samples(yacs: CfgNode, cfg) -> None:
    """The data set, and the first samples of the mappers with the same random numbers."""
    data = detection_training_data(cfg.dataloader.train, seed=0)
    assert data.total_batch_size == yacs.SOLVER.IMS_PER_BATCH
    assert cfg.dataloader.train.aspect_ratio_grouping is yacs.DATALOADER.ASPECT_RATIO_GROUPING
    keypoints = yacs.MODEL.KEYPOINT_ON
    records = get_detection_dataset_dicts(yacs.DATASETS.TRAIN, min_keypoints=int(keypoints))
    assert instantiate(cfg.dataloader.train.dataset) == records
    for split in ("train", "test"):
        theirs = DatasetMapper(yacs, is_train=split == "train")
        ours = instantiate(cfg.dataloader[split].mapper)
        for record in records[:3]:
            samples = []
            for mapper in (theirs, ours):
                np.random.seed(1)
                samples.append(mapper(copy.deepcopy(record)))
            compare(*samples)


def compare(theirs: dict, ours: dict) -> None:
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["image"], theirs["image"])
    if "instances" not in ours:
        return
    a, b = ours["instances"].get_fields(), theirs["instances"].get_fields()
    assert a.keys() == b.keys()
    assert torch.equal(a["gt_boxes"].tensor, b["gt_boxes"].tensor)
    assert torch.equal(a["gt_classes"], b["gt_classes"])
    if "gt_masks" in a:
        for x, y in zip(a["gt_masks"].polygons, b["gt_masks"].polygons, strict=True):
            assert np.array_equal(x, y)
    if "gt_keypoints" in a:
        assert torch.equal(a["gt_keypoints"].tensor, b["gt_keypoints"].tensor)


def test_crop_and_flip_and_mask_format(coco):
    yacs, cfg = both(
        MASK_FPN,
        coco,
        "INPUT.CROP.ENABLED=True",
        "INPUT.CROP.TYPE=absolute",
        "INPUT.CROP.SIZE=(40,40)",
        "INPUT.RANDOM_FLIP=vertical",
        "INPUT.MIN_SIZE_TRAIN_SAMPLING=range",
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS=False",
        "DATALOADER.ASPECT_RATIO_GROUPING=False",
    )
    mapper = cfg.dataloader.train.mapper
    assert mapper.recompute_boxes and mapper.augmentations[0].crop_type == "absolute"
    assert not cfg.dataloader.train.aspect_ratio_grouping
    assert cfg.dataloader.train.dataset.filter_empty is False
    compare_samples(yacs, cfg)


@pytest.mark.parametrize(
    "overrides",
    [
        ["SOLVER.STEPS=(4,8)", "SOLVER.GAMMA=0.3", "SOLVER.WARMUP_ITERS=3"],
        ["SOLVER.STEPS=(4,80)", "SOLVER.WARMUP_ITERS=30"],
        ["SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR", "SOLVER.BASE_LR_END=0.001"],
        [
            "SOLVER.LR_SCHEDULER_NAME=WarmupStepWithFixedGammaLR",
            "SOLVER.NUM_DECAYS=2",
            "SOLVER.RESCALE_INTERVAL=True",
            "SOLVER.WARMUP_METHOD=constant",
            "SOLVER.WARMUP_ITERS=2",
        ],
    ],
)
def test_learning_rate_of_every_iteration(overrides, coco):
    yacs, cfg = both(FASTER_FPN, coco, "SOLVER.MAX_ITER=12", "SOLVER.BASE_LR=0.02", *overrides)
    rates = []
    for stock in (True, False):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=cfg.optimizer.lr)
        if stock:
            scheduler = DefaultTrainer.build_lr_scheduler(yacs, optimizer)
        else:
            multiplier = instantiate(cfg.lr_multiplier)
            scheduler = LRMultiplier(optimizer, multiplier, cfg.train.max_iter)
        rates.append([])
        for _ in range(11):  # the fixed-gamma schedule fails at the end of the run
            rates[-1].append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert rates[0] == rates[1] and len(set(rates[0])) > 2


def test_decay_and_learning_rate_of_norms_and_biases(coco):
    yacs, cfg = both(
        "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml",
        coco,
        "SOLVER.BIAS_LR_FACTOR=2.0",
        "SOLVER.WEIGHT_DECAY_BIAS=0.03",
        "SOLVER.WEIGHT_DECAY_NORM=0.01",
        "SOLVER.NESTEROV=True",
        "SOLVER.MOMENTUM=0.8",
    )
    model = instantiate(cfg.model)
    stock = hyperparameters(model, DefaultTrainer.build_optimizer(yacs, model))
    assert hyperparameters(model, build_optimizer(cfg, model, cfg.optimizer.lr)) == stock
    assert stock["roi_heads.box_predictor.cls_score.bias"]["lr"] == 0.04
    assert len({group["weight_decay"] for group in stock.values()}) == 3
    # The engine scales the learning rate; that of biases follows.
    scaled = hyperparameters(model, build_optimizer(cfg, model, 1.0))
    assert scaled["roi_heads.box_predictor.cls_score.bias"]["lr"] == 2.0


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipping_changes_the_gradients_as_detectron2_does(kind, coco):
    yacs, cfg = both(
        FASTER_FPN,
        coco,
        "SOLVER.CLIP_GRADIENTS.ENABLED=True",
        f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE={kind}",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE=0.1",
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE=1.0",
    )
    weights = []
    for stock in (True, False):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        if stock:
            DefaultTrainer.build_optimizer(yacs, model).step()
        else:
            optimizer = build_optimizer(cfg, model, cfg.optimizer.lr)
            arguments = clipping(cfg.train.clip_grad)
            assert bool(arguments) == (kind == "value")
            if arguments:
                nn.utils.clip_grad_value_(model.parameters(), arguments["max_value"])
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*weights)


def test_train_keys(coco):
    _, cfg = both(
        FASTER_FPN,
        coco,
        "SOLVER.MAX_ITER=7",
        "SOLVER.CHECKPOINT_PERIOD=3",
        "TEST.EVAL_PERIOD=4",
        "MODEL.WEIGHTS=detectron2://ImageNetPretrained/MSRA/R-50.pkl",
        "OUTPUT_DIR=out",
        "SOLVER.AMP.ENABLED=True",
        "SEED=5",
        "CUDNN_BENCHMARK=True",
        "TEST.PRECISE_BN.ENABLED=True",
        "TEST.PRECISE_BN.NUM_ITER=9",
    )
    train = cfg.train
    assert (train.max_iter, train.checkpointer.period, train.eval_period) == (7, 3, 4)
    assert train.init_checkpoint == "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
    assert (train.output_dir, train.seed, train.cudnn_benchmark) == ("out", 5, True)
    assert train.amp == {"enabled": True, "dtype": "float16"}  # as AMPTrainer
    assert train.precise_bn == {"enabled": True, "num_iter": 9}
    assert (train.device, train.base_batch_size) == ("cpu", None)
    # Detectron2 changes nothing and keeps every periodic checkpoint.
    assert train.float32_matmul_precision == "highest" and train.checkpointer.max_to_keep is None
    assert load_config(FASTER_FPN).train.seed == 0 and load_config(FASTER_FPN).train.device is None


def test_repeat_factor_sampler(coco):
    _, cfg = both(
        FASTER_FPN,
        coco,
        "DATALOADER.SAMPLER_TRAIN=RepeatFactorTrainingSampler",
        "DATALOADER.REPEAT_THRESHOLD=0.9",
        "DATALOADER.REPEAT_SQRT=False",
    )
    sampler = instantiate(cfg.dataloader.train.sampler)
    # Each of 3 classes is in a third of the images: 0.9 / (1 / 3) = 2.7
    factors = sampler._int_part + sampler._frac_part
    assert factors.tolist() == pytest.approx([2.7] * 6)
    data = detection_training_data(cfg.dataloader.train, seed=0)
    batches = [[r["image_id"] for r in batch] for batch in data.iterate(0, 3)]
    again = [[r["image_id"] for r in batch] for batch in data.iterate(1, 3)]
    assert batches[1:] == again


@pytest.mark.parametrize(
    "kind, expected",
    [("coco", COCOEvaluator), ("pascal_voc", PascalVOCDetectionEvaluator), (None, COCOEvaluator)],
)
def test_the_evaluator_follows_the_type(kind, expected, coco, tmp_path):
    name = f"evaluated as {kind}"
    given = {
        key: value
        for key, value in MetadataCatalog.get(coco).as_dict().items()
        if key not in ("name", "evaluator_type")
    }
    MetadataCatalog.get(name).set(**given, dirname=str(tmp_path), split="test", year=2007)
    if kind:
        MetadataCatalog.get(name).evaluator_type = kind
    (tmp_path / "Annotations").mkdir()
    try:
        assert type(build_evaluator(name, str(tmp_path))) is expected
        boxes = build_evaluator(name, str(tmp_path), tasks=["bbox"])
        assert expected is not COCOEvaluator or boxes._tasks == ("bbox",)
    finally:
        MetadataCatalog.remove(name)


def test_an_evaluator_that_cannot_work_is_refused(coco, tmp_path):
    for kind, message in (("cityscapes_instance", "cityscapesscripts"), ("mine", "mine is unkno")):
        MetadataCatalog.get("odd").evaluator_type = kind
        with pytest.raises(UserError, match=message):
            build_evaluator("odd", str(tmp_path))
        MetadataCatalog.remove("odd")


@pytest.mark.parametrize("name", [FASTER_FPN, "COCO-Detection/retinanet_R_50_FPN_1x.yaml"])
def test_two_iterations(name, coco, tmp_path):
    _, cfg = both(name, coco, "SOLVER.MAX_ITER=2", f"OUTPUT_DIR={tmp_path / 'run'}")
    results = do_train(cfg)
    assert results["bbox"].keys() >= {"AP", "AP50"}
    assert (tmp_path / "run" / "model_final.pth").exists()
    # What was saved is what the run resumes with.
    _, again = both(name, coco, "SOLVER.MAX_ITER=2", f"OUTPUT_DIR={tmp_path / 'run'}")
    assert do_train(again, resume=True)["bbox"].keys() == results["bbox"].keys()


def test_the_json_of_a_yacs_config_is_fixed_for_its_evaluation(coco, tmp_path):
    folder = Path(MetadataCatalog.get(coco).image_root)
    data = json.loads((folder / "coco.json").read_text())
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    (tmp_path / "coco.json").write_text(json.dumps(data))
    register_coco_instances("to be fixed", {}, str(tmp_path / "coco.json"), str(folder))
    try:
        _, cfg = both(FASTER_FPN, "to be fixed", "SOLVER.MAX_ITER=1", f"OUTPUT_DIR={tmp_path}/run")
        assert do_train(cfg)["bbox"].keys() >= {"AP", "AP50"}
    finally:
        DatasetCatalog.remove("to be fixed")
        MetadataCatalog.remove("to be fixed")
