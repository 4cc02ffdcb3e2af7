"""Finding, recognising, reading and overriding yacs configs."""

import re
from functools import partial
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg, instantiate
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone, build_model
from forked import run_tool
from omegaconf import OmegaConf
from zoo import SMALL

from region_pretrain.config import CONFIG_ROOT, load_config, num_classes_keys, to_yaml
from region_pretrain.data.other_labels import _stuff_key
from region_pretrain.engine.methods import load_method
from region_pretrain.errors import UserError
from region_pretrain.yacs import (
    find_config_file,
    is_yacs,
    read_yacs,
    split_overrides,
    to_lazy_config,
)
from region_pretrain.yacs.build import build_backbone, build_detector, build_resnet
from region_pretrain.yacs.detector import lazy_detector, plain

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def test_a_name_of_the_model_zoo_and_a_path():
    path = model_zoo.get_config_file(FASTER)
    assert find_config_file(FASTER) == find_config_file(f"model_zoo://{FASTER}") == path
    assert find_config_file(path) == path
    lazy = load_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py")
    assert lazy.train.max_iter == 90000
    with pytest.raises(UserError, match="detectron2:// names weights; write a config of the mod"):
        find_config_file(f"detectron2://{FASTER}")
    with pytest.raises(UserError, match="no config file absent.yaml"):
        find_config_file("absent.yaml")


def test_a_file_of_the_same_name_comes_first(tmp_path, monkeypatch):
    (tmp_path / "COCO-Detection").mkdir()
    (tmp_path / FASTER).write_text("train: {max_iter: 3}\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(FASTER).train.max_iter == 3
    assert load_config(f"model_zoo://{FASTER}").train.max_iter == 90000


def test_shipped_configs_are_found_from_any_folder_and_own_files_come_first(tmp_path, monkeypatch):
    name = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
    monkeypatch.chdir(tmp_path)
    assert find_config_file(name) == str(CONFIG_ROOT.parent / name)
    with pytest.raises(UserError, match="mask_rcn_r18.*; did you mean mask_rcnn_r18_fpn_shapes.py"):
        find_config_file("configs/detection/mask_rcn_r18_fpn_shapes.py")
    (tmp_path / "configs/detection").mkdir(parents=True)
    (tmp_path / name).write_text("train = dict(max_iter=3)\n")
    assert find_config_file(name) == name and load_config(name).train.max_iter == 3


def test_recognised_by_content(tmp_path):
    path = tmp_path / "config.yaml"
    for text in ("_BASE_: x.yaml\n", "# a\nMODEL:\n  MASK_ON: True\n", '"SOLVER": {}\n'):
        path.write_text(text)
        assert is_yacs(str(path)), text
    path.write_text(to_yaml(load_config(FASTER)))  # contains a yacs config in lower-case keys
    assert not is_yacs(str(path))
    assert not is_yacs(str(CONFIG_ROOT / "common/train.py"))


def test_bases_and_overrides(tmp_path):
    base = model_zoo.get_config_file("Base-RCNN-FPN.yaml")
    path = tmp_path / "mine.yaml"
    path.write_text(f"_BASE_: {base}\nMODEL:\n  MASK_ON: False\nSOLVER:\n  BASE_LR: 0.01\n")
    overrides = [
        "MODEL.ROI_HEADS.NUM_CLASSES=3",
        "SOLVER.BASE_LR=1",
        "DATASETS.TRAIN=[a,b]",
        "DATASETS.TEST=coco://x.json?images=DIR",
        "OUTPUT_DIR=123",
        "MODEL.WEIGHTS=",
        "INPUT.MIN_SIZE_TRAIN=(320,)",
        "SOLVER.NESTEROV=true",
        "SOLVER.WEIGHT_DECAY_BIAS=null",
    ]
    cfg = read_yacs(str(path), overrides)
    assert cfg.MODEL.BACKBONE.NAME == "build_resnet_fpn_backbone"  # of the base
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and cfg.SOLVER.BASE_LR == 1.0
    assert cfg.DATASETS.TRAIN == ("a", "b") and cfg.DATASETS.TEST == ("coco://x.json?images=DIR",)
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("123", "")
    assert cfg.INPUT.MIN_SIZE_TRAIN == (320,) and cfg.SOLVER.NESTEROV is True
    assert cfg.SOLVER.WEIGHT_DECAY_BIAS is None

    both = load_config(str(path), ["train.output_dir=here", *overrides, "optimizer.lr=0.5"])
    assert (both.train.output_dir, both.optimizer.lr) == ("here", 0.5)
    assert both.model.cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3
    assert both.dataloader.train.dataset.names == ["a", "b"]


def test_overrides_are_separated_by_case():
    yacs = ["MODEL.X=1", "SEED=3", "+MODEL.Y=2", "MODEL.WEIGHTS"]
    lazy = ["train.X=1", "+model.Y=2", "model.cfg.MODEL.X=3", "trainX=1"]
    assert split_overrides([*yacs, *lazy]) == (yacs, lazy)


@pytest.mark.parametrize(
    "override, message",
    [
        ("MODEL.ROI_HEADS.NUM_CLASS=3", "no key .*did you mean MODEL.ROI_HEADS.NUM_CLASSES"),
        ("MODEL.ROI_HEADS.NUM_CLASSES=many", "MODEL.ROI_HEADS.NUM_CLASSES must be of type int"),
        ("MODEL.MASK_ON=3", "MODEL.MASK_ON must be of type bool"),
        ("MODEL.ROI_HEADS=3", "MODEL.ROI_HEADS is a group"),
        ("SOLVER.STEPS=null", "SOLVER.STEPS must be of type tuple"),
        ("MODEL.WEIGHTS", "write MODEL.WEIGHTS=VALUE"),
        ("MODEL.MASK_ON.X=3", "no key 'MODEL.MASK_ON.X'"),
        (
            "TEST.AUG.ENABLED=True",
            "TEST.AUG.ENABLED=True is not supported: set TEST.AUG.ENABLED",
        ),
        ("SOLVER.REFERENCE_WORLD_SIZE=8", "set SOLVER.REFERENCE_WORLD_SIZE=0"),
        ("FLOAT32_PRECISION=high", "FLOAT32_PRECISION=high is not supported: set FLOAT32_PRECI"),
        ("DATASETS.TEST=[a,b]", r"DATASETS.TEST=\['a', 'b'\]: name .*exactly one test set"),
        ("DATASETS.TRAIN=()", r"DATASETS.TRAIN=\[\].*at least one training set"),
        ("DATALOADER.SAMPLER_TRAIN=Mine", "DATALOADER.SAMPLER_TRAIN=Mine: must be"),
        ("SOLVER.LR_SCHEDULER_NAME=Mine", "SOLVER.LR_SCHEDULER_NAME=Mine: must be"),
        ("MODEL.DEVICE=cuda:1", "MODEL.DEVICE=cuda:1: must be cuda or cpu"),
        ("MODEL.LOAD_PROPOSALS=True", "DATASETS.PROPOSAL_FILES_TRAIN=.*one file for each of"),
        ("DATASETS.TRAIN=[coco://a?images=b,coco://c]", "quote the items of a list"),
        ("MODEL.WEIGHTS=[x", "quote the items of a list"),
        ("SOLVER.MAX_ITER=0", "SOLVER.MAX_ITER=0: must be at least 1"),
    ],
)
def test_refused_in_one_line(override, message):
    with pytest.raises(UserError, match=message) as error:
        load_config(FASTER, [override])
    assert "\n" not in str(error.value)


def test_gradients_are_clipped_as_the_config_says():
    clip = "SOLVER.CLIP_GRADIENTS.{}"
    given = [clip.format("ENABLED=True"), clip.format("CLIP_VALUE=0.5")]
    cfg = load_config(FASTER, [*given, clip.format("CLIP_TYPE=full_model")])
    assert (cfg.train.clip_grad.enabled, cfg.train.clip_grad.max_norm) == (True, 0.5)
    assert cfg.train.clip_grad.max_value is None
    with pytest.raises(UserError, match="CLIP_TYPE=Norm: must be value, norm .* or full_model"):
        load_config(FASTER, [*given, clip.format("CLIP_TYPE=Norm")])


def test_the_home_folder_and_a_schedule_that_ends_with_a_drop(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    cfg = load_config(FASTER, ["MODEL.WEIGHTS=~/x.pth", "SOLVER.MAX_ITER=80000"])
    assert cfg.train.init_checkpoint == "/home/me/x.pth"
    multiplier = instantiate(cfg.lr_multiplier)  # the second drop is at 80,000
    assert multiplier(0.5) == 1.0 and multiplier(1.0) == pytest.approx(0.1)
    with pytest.raises(UserError, match="SOLVER.BASE_LR=0.0: must be above 0 for WarmupCosineLR"):
        load_config(FASTER, ["SOLVER.BASE_LR=0", "SOLVER.LR_SCHEDULER_NAME=WarmupCosineLR"])


def test_a_file_cannot_run_code(tmp_path):
    ran = tmp_path / "ran"
    call = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path [{ran}]]"
    (tmp_path / "base.yaml").write_text(f"MODEL:\n  WEIGHTS: {call}\n")
    (tmp_path / "mine.yaml").write_text("_BASE_: base.yaml\nSEED: 3\n")
    for name in ("base", "mine"):
        with pytest.raises(UserError, match=f"{name}.yaml runs code when it is read: replace"):
            load_config(str(tmp_path / f"{name}.yaml"))
    assert not ran.exists()
    # Detectron2's own expression, in a copy of its folder.
    zoo = Path(model_zoo.get_config_file("Base-RetinaNet.yaml"))
    (tmp_path / "copy.yaml").write_text(zoo.read_text())
    (tmp_path / "retina.yaml").write_text("_BASE_: copy.yaml\nSOLVER:\n  MAX_ITER: 7\n")
    cfg = load_config(str(tmp_path / "retina.yaml"), ["DATASETS.TRAIN=a", "DATASETS.TEST=b"])
    assert cfg.train.max_iter == 7
    sizes = cfg.model.cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes[1][2] == pytest.approx(64 * 2 ** (2 / 3))


def test_a_base_that_is_missing_or_names_itself(tmp_path):
    mine = tmp_path / "mine.yaml"
    for base, reason in (
        ("Base-RCNN-FPN.yaml", "No such file.*Base-RCNN"),
        ("mine.yaml", "recurs"),
    ):
        mine.write_text(f"_BASE_: {base}\nMODEL:\n  MASK_ON: True\n")
        for load in (load_config, partial(load_method, "soco")):
            with pytest.raises(UserError, match=f"mine.yaml is not a config of .*{reason}"):
                load(str(mine))


def test_a_semantic_segmentor_has_no_classes_of_things():
    cfg = load_config("Misc/semantic_R_50_FPN_1x.yaml", ["MODEL.SEM_SEG_HEAD.NUM_CLASSES=3"])
    assert num_classes_keys(cfg) == []
    assert _stuff_key(cfg) == "model.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES"


def test_a_detector_of_a_fork(tmp_path):
    """Its modules are registered by a file, and its config has keys of its own."""
    module = tmp_path / "fork.py"
    module.write_text(
        "from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, GeneralizedRCNN\n"
        "from detectron2.modeling.backbone.fpn import build_resnet_fpn_backbone\n"
        "@META_ARCH_REGISTRY.register()\n"
        "class ForksRCNN(GeneralizedRCNN): pass\n"
        "@BACKBONE_REGISTRY.register()\n"
        "def build_forks_backbone(cfg, shape):\n"
        "    assert shape.channels == 3\n"
        "    return build_resnet_fpn_backbone(cfg, shape)\n"
    )
    config = tmp_path / "fork.yaml"
    config.write_text(
        f"_BASE_: {model_zoo.get_config_file(FASTER)}\n"
        "MODEL: {META_ARCHITECTURE: ForksRCNN, BACKBONE: {NAME: build_forks_backbone, "
        "FREEZE_AT: 0}, FPN: {NORM: SyncBN}, RESNETS: {NORM: SyncBN}}\n"
    )
    with pytest.raises(UserError, match="MODEL.BACKBONE.NAME=build_forks_backbone cannot be conv"):
        load_method("soco", str(config))
    cfg = load_method("soco", str(config), [f"train.register=[{module}]"])
    assert cfg.model.head is not None and cfg.train.register == [str(module)]
    (tmp_path / "run.yaml").write_text(
        to_yaml(load_config(str(config), [f"train.register=[{module}]"]))
    )
    cfg = load_method("moco", str(tmp_path / "run.yaml"))
    assert cfg.train.register == [str(module)]  # for other processes
    for value in ("null", str(module)):
        with pytest.raises(UserError, match="train.register=.*: must be a list"):
            load_method("moco", str(config), [f"train.register={value}"])
    # The trunk needs no head.
    config.write_text(config.read_text().replace("0}", "0}, ROI_BOX_HEAD: {NAME: ForksHead}"))
    load_method("moco", str(config))
    with pytest.raises(UserError, match="ForksHead|box head"):
        load_method("soco", str(config))
    config.write_text(config.read_text().replace(", ROI_BOX_HEAD: {NAME: ForksHead}", ""))
    fork = get_cfg()
    fork.merge_from_file(str(config))
    fork.MODEL.FORK_WIDTH = 3
    with torch.device("meta"):
        assert type(instantiate(to_lazy_config(fork).model)).__name__ == "ForksRCNN"


@pytest.mark.parametrize(("name", "channels", "stride"), [("p3", 48, 16), ("stage3", 24, 8)])
def test_a_backbone_of_ones_own_has_its_own_channels_and_strides(
    name, channels, stride, monkeypatch
):
    class OwnBackbone(Backbone):
        def __init__(self, cfg, input_shape):
            super().__init__()
            self.rates = [x.item() for x in torch.linspace(0, 1, 3)]
            self.conv = torch.nn.Conv2d(input_shape.channels, channels, 3)

        def forward(self, x):
            return {name: self.conv(x)}

        def output_shape(self):
            return {name: ShapeSpec(channels=channels, stride=stride)}

    monkeypatch.setitem(BACKBONE_REGISTRY._obj_map, "OwnBackbone", OwnBackbone)
    cfg = get_cfg()
    cfg.merge_from_file(find_config_file(FASTER))
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.DEVICE = "OwnBackbone", "cpu"
    for key in ("ROI_HEADS", "RPN"):
        cfg.MODEL[key].IN_FEATURES = [name]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[32]]
    stock = build_model(cfg).roi_heads
    state = torch.random.get_rng_state()
    heads = lazy_detector(cfg).roi_heads
    assert torch.equal(torch.random.get_rng_state(), state)
    pooler = instantiate(heads.box_pooler)
    for built in (pooler, stock.box_pooler):
        assert [level.spatial_scale for level in built.level_poolers] == [1 / stride]
    head = instantiate(heads.box_head)
    assert head.fc1.weight.shape == stock.box_head.fc1.weight.shape
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["p2"]
    with pytest.raises(UserError, match=f"OwnBackbone has no p2, but {name}"):
        lazy_detector(cfg)


def test_an_unknown_key_in_a_file_and_yacs_overrides_of_other_configs(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("MODEL:\n  SWIN: {DEPTH: 3}\n")
    with pytest.raises(UserError, match=r"mine.yaml is not a config of Detectron2: .*MODEL.SWIN"):
        load_config(str(path))
    path.write_text("MODEL: [\n")
    with pytest.raises(UserError, match=r"mine.yaml is not a config of Detectron2"):
        load_config(str(path))
    with pytest.raises(UserError, match="'MODEL.MASK_ON=True': .* is not a yacs config"):
        load_config("common/train.py", ["MODEL.MASK_ON=True"])


@pytest.mark.parametrize(
    ("key", "counterpart"),
    [
        ("SOLVER.MAX_ITER", "train.max_iter"),
        ("SOLVER.BASE_LR", "optimizer.lr"),
        ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
        ("SOLVER.STEPS", "lr_multiplier.*"),
        ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
        ("INPUT.MIN_SIZE_TEST", "dataloader.test.mapper.*"),
        ("INPUT.CROP.ENABLED", "dataloader.train.mapper.*"),
        ("DATASETS.TEST", "dataloader.test.dataset.names"),
        ("TEST.EVAL_PERIOD", "train.eval_period"),
        ("OUTPUT_DIR", "train.output_dir"),
        ("MODEL.WEIGHTS", "train.init_checkpoint"),
    ],
)
def test_keys_that_a_conversion_has_used_are_refused_with_their_counterpart(
    key, counterpart, tmp_path
):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config(RETINANET)))
    override = f"model.cfg.{key}=3"
    for file in (RETINANET, str(path)):
        with pytest.raises(UserError) as error:
            load_config(file, [override])
        assert str(error.value) == (
            f"override {override!r} has no effect once the config is converted: use {counterpart}"
        )
    with pytest.raises(
        UserError, match=f"keys .* are in lower case: use {re.escape(counterpart)}$"
    ):
        load_config(str(path), [f"{key}=3"])


def test_keys_that_the_converted_model_reads_can_be_changed(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config(RETINANET)))
    for key in ("TEST.DETECTIONS_PER_IMAGE", "INPUT.FORMAT", "MODEL.FPN.OUT_CHANNELS"):
        value = "RGB" if "FORMAT" in key else 7
        cfg = load_config(str(path), [f"model.cfg.{key}={value}"])
        assert OmegaConf.select(cfg, f"model.cfg.{key}") == value
        with pytest.raises(UserError, match="in lower case$"):
            load_config(str(path), [f"{key}={value}"])


def test_proposals():
    cfg = load_config("COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml").dataloader
    assert cfg.train.dataset.proposal_files[0].endswith(
        "rpn_R_50_FPN_1x/137258492/coco_2017_train" "_box_proposals_21bc3a.pkl"
    )
    assert cfg.train.mapper.precomputed_proposal_topk == 2000
    assert cfg.test.mapper.precomputed_proposal_topk == 1000


def test_fine_tuning_on_two_processes(tmp_path):
    """The tool, from a zoo name."""
    shapes = "{_target_:region_pretrain.data.shapes.shapes,split:val,size:4,side:64}"
    command = ["train_net.py", "--config-file", FASTER, *SMALL]
    command += [f"dataloader.{split}.dataset.names={shapes}" for split in ("train", "test")]
    command += ["MODEL.DEVICE=cpu", "--num-gpus", "2", "SOLVER.MAX_ITER=2"]
    command += ["MODEL.ROI_HEADS.NUM_CLASSES=8", f"train.output_dir={tmp_path}"]
    done = run_tool(*command, seconds=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert Path(tmp_path, "model_final.pth").exists()


@pytest.mark.parametrize(
    ("key", "value", "needed"),
    [("RES2_OUT_CHANNELS", 256, 64), ("RES5_DILATION", 2, 1), ("NUM_GROUPS", 2, 1)],
)
def test_settings_that_basic_blocks_do_not_have_are_named(key, value, needed):
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH, cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 18, 64
    cfg.MODEL.RESNETS[key] = value
    for build in (build_detector, build_resnet, build_backbone):
        with pytest.raises(UserError) as error, torch.device("meta"):
            build(plain(cfg))
        assert str(error.value) == (
            f"MODEL.RESNETS.{key}={value}: a ResNet with MODEL.RESNETS.DEPTH=18 needs "
            f"MODEL.RESNETS.{key}={needed}"
        )


def test_depth_that_no_resnet_has_is_named():
    cfg = get_cfg()
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.RESNETS.DEPTH = 20
    for build in (build_detector, build_resnet, build_backbone):
        with pytest.raises(UserError) as error, torch.device("meta"):
            build(plain(cfg))
        assert str(error.value) == ("MODEL.RESNETS.DEPTH=20: expected one of 18, 34, 50, 101, 152")
