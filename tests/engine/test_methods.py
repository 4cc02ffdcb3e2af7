"""``--method NAME --detector FILE``: which pairs fit, what is built, and what loads afterwards."""

import sys
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import instantiate
from detectron2.modeling import build_model as build_yacs_model
from forked import run_tool
from omegaconf import OmegaConf
from torch.optim import AdamW

from region_pretrain.config import CONFIG_ROOT, changed_keys, load_config, to_yaml
from region_pretrain.engine.build import build_pretraining_model
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.engine.command_line import argument_parser, config_of
from region_pretrain.engine.methods import (
    add_method_arguments,
    default_recipe,
    load_detector,
    load_method,
)
from region_pretrain.engine.trainable import check_trainable
from region_pretrain.errors import UserError
from region_pretrain.jobs import submission
from region_pretrain.projects.soco import SoCo
from region_pretrain.solver import LARS
from region_pretrain.yacs import find_config_file, read_yacs

sys.path.insert(0, str(Path(__file__).parents[1] / "yacs"))
from zoo import NARROW, TRAINABLE

FPN = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
C4 = "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml"
DC5 = "COCO-Detection/faster_rcnn_R_50_DC5_1x.yaml"
RETINA = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
RPN = "COCO-Detection/rpn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
CONVERTED = [
    FPN,
    C4,
    DC5,
    RETINA,
    CASCADE,
    "COCO-Detection/faster_rcnn_X_101_32x8d_FPN_3x.yaml",
    RPN,
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_3x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml",
    "PascalVOC-Detection/faster_rcnn_R_50_C4.yaml",
]
LSJ = "new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py"
#: Method -> detectors that it pre-trains, and the modules that its checkpoint fills.
TOWERS = {"head.cls_subnet", "head.bbox_subnet"}
FPN_AND_HEAD = {"backbone.bottom_up", "backbone.fpn", "roi_heads.box_head"}
FITS = [
    ("soco", FPN, FPN_AND_HEAD),
    ("soco", C4, {"backbone", "roi_heads.res5"}),
    ("soco", DC5, {"backbone", "roi_heads.box_head"}),
    ("soco", RETINA, {"backbone.bottom_up", "backbone.fpn", "backbone.top_block", *TOWERS}),
    ("soco", CASCADE, FPN_AND_HEAD),
    ("ccop", CASCADE, {"backbone.bottom_up", "backbone.fpn"}),
    ("mcl", FPN, FPN_AND_HEAD),
    ("mcl", CASCADE, FPN_AND_HEAD),
    ("point_region", RETINA, {"backbone.bottom_up", "backbone.fpn", "backbone.top_block"}),
    ("moco", C4, {"backbone", "roi_heads.res5"}),
    ("moco", RETINA, {"backbone.bottom_up"}),
    ("byol", DC5, {"backbone"}),
]
REFUSED = [
    ("soco", RPN, "neither a box head nor towers, which SoCo trains: use moco, byol, point_region"),
    ("ccop", C4, "no feature pyramid, which CCOP trains: use soco, point_region, moco or byol"),
    ("mcl", DC5, "lacks a feature pyramid or a head .*: use soco, point_region, moco or byol"),
    ("mcl", RPN, "lacks a feature pyramid or a head"),
]


def state_of(module: torch.nn.Module) -> dict[str, tuple]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", CONVERTED)
def test_a_converted_detector_has_detectron2s_names_and_shapes(name):
    cfg = read_yacs(find_config_file(name), ["MODEL.DEVICE=meta"])
    with torch.device("meta"):
        stock = build_yacs_model(cfg)
        lazy, _ = load_detector(name)
        backbone = instantiate(lazy.backbone)
        assert state_of(backbone) == state_of(stock.backbone)
        assert backbone.output_shape() == stock.backbone.output_shape()
        heads = lazy.get("roi_heads", {})
        for part in {"box_head", "box_heads", "res5"} & set(heads):
            built = instantiate(heads[part])
            built = built if isinstance(built, torch.nn.Module) else torch.nn.Sequential(*built)
            assert state_of(built) == state_of(getattr(stock.roi_heads, part.rstrip("s")))
        if "head" in lazy:
            assert state_of(instantiate(lazy.head)) == state_of(stock.head)
    for key in ("box_pooler", "pooler"):
        if key in heads:
            mine, theirs = instantiate(heads[key]), getattr(stock.roi_heads, key)
            assert str(mine) == str(theirs) and "spatial_scale" in str(mine)
            features = "box_in_features" if key == "box_pooler" else "in_features"
            assert heads[features] == getattr(stock.roi_heads, features)
    assert {"box_head", "box_heads", "res5"} & set(heads) or "head" in lazy or name == RPN
    assert torch.tensor(list(lazy.pixel_mean)).shape == (3,)
    assert (list(lazy.pixel_mean), list(lazy.pixel_std), lazy.input_format) == (
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.PIXEL_STD,
        cfg.INPUT.FORMAT,
    )


@pytest.mark.parametrize(("method", "detector", "modules"), FITS)
def test_what_is_pretrained_loads_into_the_yacs_detector(method, detector, modules, tmp_path):
    overrides = [*NARROW, *TRAINABLE]
    if detector in (C4, DC5, RETINA):
        overrides.remove("MODEL.FPN.NORM=SyncBN")
    cfg = load_method(method, detector, overrides)
    assert cfg.train.epochs >= 100 and cfg.train.output_dir == f"output/{method}"
    for queue in (key for key in cfg.model if key.endswith("queue")):
        cfg.model[queue].length = 64
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(cfg))
    model = build_pretraining_model(load_config(str(path)), torch.device("cpu"))
    with torch.no_grad():
        for value in (*model.parameters(), *model.buffers()):
            if value.is_floating_point():
                value.normal_()
    saved = split_state(model)[0]
    torch.save({"model": saved}, tmp_path / "model_final.pth")

    yacs = read_yacs(find_config_file(detector), [*overrides, "MODEL.DEVICE=cpu"])
    stock = build_yacs_model(yacs)
    checkpointer = DetectionCheckpointer(stock)
    incompatible = []
    checkpointer._log_incompatible_keys = incompatible.append
    checkpointer.load(str(tmp_path / "model_final.pth"))
    state = stock.state_dict()
    assert not incompatible[0].unexpected_keys and not incompatible[0].incorrect_shapes
    for name, value in saved.items():
        assert torch.equal(state[name], value), name
    filled = {name for module in modules for name in state if module_matches(name, module)}
    assert filled == set(saved) & set(state) and filled


def module_matches(name: str, module: str) -> bool:
    if module == "backbone.fpn":
        return name.startswith("backbone.fpn_")
    return name.startswith(f"{module}.")


@pytest.mark.parametrize(("method", "detector", "message"), REFUSED)
def test_pairs_that_do_not_fit_are_refused_with_one_that_does(method, detector, message):
    with pytest.raises(UserError, match=message) as error:
        load_method(method, detector, TRAINABLE)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["soco", "SoCo", "PointRegionContrast", "point_region", "point-region-contrast", "BYOL"]
)
def test_names_of_methods(name):
    cfg = load_method(name, LSJ, ["optimizer.lr=0.5", "train.epochs=3"])
    assert cfg.optimizer.lr == 0.5 and cfg.train.epochs == 3
    assert cfg.train.checkpointer.period > 0  # complete


def test_unknown_methods_and_detectors_are_named():
    with pytest.raises(UserError, match="method simclr: must be one of BYOL, CCOP, MCL, MoCo"):
        load_method("simclr", LSJ)
    with pytest.raises(UserError, match="--detector absent.yaml: no config file absent.yaml"):
        load_method("soco", "absent.yaml")
    recipe = str(CONFIG_ROOT.parent / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")
    with pytest.raises(UserError, match="--detector .*shapes.py: a pre-training config"):
        load_method("soco", recipe)
    with pytest.raises(UserError, match="not the config of a detector"):
        load_method("soco", "common/optim.py")
    with pytest.raises(UserError, match="no key 'optimizer.rate'"):
        load_method("soco", LSJ, ["optimizer.rate=1"])
    with pytest.raises(UserError, match="NAME=mine cannot be converted.* build_resnet_fpn"):
        load_method("soco", FPN, ["MODEL.BACKBONE.NAME=mine"])


OWN = """
from own_method_{0} import pretrain as _pretrain

from region_pretrain.config import get_config

_soco = get_config("projects/SoCo/configs/common/soco.py")
dataloader, optimizer, lr_multiplier, train = (
    _soco.dataloader, _soco.optimizer, _soco.lr_multiplier, _soco.train
)
train.epochs = 7


def pretrain(detector):
    return _pretrain(detector)
"""


def test_a_recipe_outside_of_the_repository(tmp_path, monkeypatch):
    name = tmp_path.name.replace("-", "_")
    path = tmp_path / "mine.py"
    path.write_text(OWN.format(name))
    with pytest.raises(UserError) as error:
        load_method(str(path), LSJ)
    assert str(error.value) == (
        f"method {path} cannot be loaded: ModuleNotFoundError: No module named "
        f"'own_method_{name}'; is its folder on PYTHONPATH?"
    )
    (tmp_path / f"own_method_{name}.py").write_text(
        "from region_pretrain.projects.soco.build import soco as pretrain\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    cfg = load_method(str(path), LSJ, ["optimizer.lr=0.5"])
    assert (cfg.train.epochs, cfg.optimizer.lr) == (7, 0.5)
    assert cfg.model._target_ is SoCo or cfg.model._target_.endswith(".SoCo")
    assert default_recipe(str(path)) == "soco-v1"
    with pytest.raises(UserError, match="method absent.py: no such file"):
        load_method("absent.py", LSJ)
    with pytest.raises(UserError, match="no function pretrain.* is given as --config-file"):
        load_method(str(CONFIG_ROOT / "detection/mask_rcnn_swin_t_fpn.py"), LSJ)


def test_frozen_layers_need_weights():
    changes = "MODEL.BACKBONE.FREEZE_AT=0 MODEL.RESNETS.NORM=SyncBN MODEL.FPN.NORM=SyncBN"
    with pytest.raises(UserError, match=f"freezes layers.*: add {changes}, or give"):
        load_method("soco", FPN)
    load_method("soco", FPN, changes.split())
    cfg = load_method("soco", FPN, ["train.init_checkpoint=weights.pth"])
    assert cfg.model.backbone.bottom_up.cfg.MODEL.RESNETS.NORM == "FrozenBN"

    # Also with --config-file, when the run has built its model.
    cfg.train.init_checkpoint = ""
    with pytest.raises(UserError, match=f"freezes layers.*: add {changes}, or give"):
        check_trainable(cfg, build_pretraining_model(cfg, torch.device("meta")))


def test_weights_are_given_to_the_run_and_not_to_the_detector():
    override = "MODEL.WEIGHTS='~/R-50.pkl'"
    with pytest.raises(UserError) as error:
        load_method("moco", FPN, [*TRAINABLE, override])
    assert str(error.value) == (
        f"override {override!r}: a pre-training does not start from its detector's weights: use "
        "train.init_checkpoint=~/R-50.pkl"
    )
    cfg = load_method("moco", FPN, [*TRAINABLE, "MODEL.WEIGHTS="])  # nor are those of its file
    assert cfg.train.init_checkpoint == ""


@pytest.mark.parametrize("datasets", ["", "DATASETS: {TEST: ['val', 'test']}\n"])
def test_data_sets_of_a_yacs_detector_do_not_matter(tmp_path, datasets):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"{datasets}TEST: {{AUG: {{ENABLED: True}}}}\n_BASE_: {find_config_file(FPN)}\n"
    )
    cfg = load_method("soco", str(path), TRAINABLE)
    assert cfg.model == load_method("soco", FPN, TRAINABLE).model


def test_frozen_layers_of_a_lazy_config():
    lazy = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py"
    with pytest.raises(UserError, match="freezes layers") as error:
        load_method("moco", lazy)
    changes = str(error.value).partition(": add ")[2].partition(",")[0].split()
    assert len(changes) == 3
    assert all(change.startswith("model.backbone.bottom_up.") for change in changes)
    load_method("moco", lazy, changes)


def test_frozen_weights_without_norms_are_noticed():
    frozen = ["MODEL.BACKBONE.FREEZE_AT=3", "MODEL.RESNETS.NORM=GN"]
    with pytest.raises(UserError, match="add MODEL.BACKBONE.FREEZE_AT=0 MODEL.FPN.NORM"):
        load_method("ccop", FPN, frozen)


def test_a_mapper_that_reads_another_channel_order_is_refused(tmp_path):
    path = tmp_path / "rgb.py"
    path.write_text(
        "from detectron2.model_zoo import get_config\n"
        f"_zoo = get_config({LSJ!r})\n"
        "model, dataloader = _zoo.model, _zoo.dataloader\n"
        'dataloader.train.mapper.image_format = "RGB"\n'
    )
    with pytest.raises(UserError) as error:
        load_method("soco", str(path))
    assert str(error.value) == (
        f"--detector {path}: model.input_format=BGR, but "
        "dataloader.train.mapper.image_format=RGB: set both to the channel order of "
        "model.pixel_mean and of the initial weights"
    )
    with path.open("a") as file:
        file.write('model.input_format = "RGB"\n')
    assert load_method("soco", str(path)).model.input_format == "RGB"
    with path.open("a") as file:
        file.write("model.input_format = None\n")
    assert load_method("soco", str(path)).model.input_format == "RGB"


def test_trunks_with_layer_norms_are_trained_with_adamw(caplog):
    swin = str(CONFIG_ROOT / "detection/mask_rcnn_swin_t_fpn.py")
    cfg = load_method("soco", swin, ["train.epochs=20", "optimizer.lr=0.001"])
    assert cfg.optimizer._target_ == "torch.optim.adamw.AdamW" or cfg.optimizer._target_ is AdamW
    assert (cfg.optimizer.lr, cfg.optimizer.weight_decay) == (0.001, 0.05)
    assert (cfg.lr_multiplier.warmup_epochs, cfg.train.clip_grad.max_norm) == (10, 3.0)
    assert cfg.train.output_dir == "output/soco" and cfg.train.base_batch_size == 256
    assert "optimiser and schedule are those of configs/common/adamw_pretrain.py" in caplog.text
    caplog.clear()
    assert load_method("soco", LSJ).optimizer._target_ is LARS and not caplog.text


def test_a_saved_fine_tuning_config_is_a_detector(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(to_yaml(load_config(FPN, [*NARROW, *TRAINABLE])))
    assert load_detector(str(path)) == load_detector(FPN, [*NARROW, *TRAINABLE])
    shipped = load_config(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    path.write_text(to_yaml(shipped))
    cfg = load_method("soco", str(path))
    assert OmegaConf.select(cfg, "model.backbone.out_channels") == 48


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "soco"],
        ["--detector", FPN],
        ["--method", "soco", "--detector", FPN, "--config-file", "x"],
    ],
)
def test_the_two_arguments_belong_together(arguments):
    parser = argument_parser("", "x")
    add_method_arguments(parser)
    with pytest.raises(UserError, match="--method NAME and --detector FILE belong together"):
        config_of(parser.parse_args(arguments))


def pretrain(method: str, detector: str, images: Path, folder: Path, *more: str):
    return run_tool(
        *("pretrain_net.py", "--method", method, "--detector", detector),
        f"dataloader.train.dataset.names=folder://{images}",
        *("dataloader.train.total_batch_size=4", "dataloader.train.num_workers=0"),
        *(f"train.output_dir={folder}", "train.device=cpu", "train.max_iter=2", *more),
    )


@pytest.mark.parametrize(("detector", "sizes"), [(FPN, "[64,64,32]"), (DC5, "[64,64,64]")])
def test_two_steps_of_pretraining(detector, sizes, region_folder, tmp_path):
    trainable = [o for o in TRAINABLE if detector == FPN or "FPN" not in o]
    normalised = detector == FPN
    if normalised:
        trainable.append("MODEL.PIXEL_STD=[57.375,57.12,58.395]")
    done = pretrain(
        "soco", detector, region_folder.images, tmp_path / "run",
        f"dataloader.train.dataset.regions={region_folder.store}",
        "dataloader.train.dataset.recipe=null", f"dataloader.train.dataset.views.sizes={sizes}",
        *NARROW, *trainable,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    log = (tmp_path / "run" / "log.txt").read_text()
    assert ("pixels are not normalised: their std is [1, 1, 1]" in log) is not normalised
    saved = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)["model"]
    assert any(name.startswith("roi_heads.box_head.fc1") for name in saved)


def test_submission_saves_the_config(monkeypatch, tmp_path):
    """The job reads a saved config: neither the detector's file nor the overrides are needed."""
    submitted = []
    monkeypatch.setattr(submission, "_submit", lambda *args: submitted.append(args))
    parser = argument_parser("", "x")
    add_method_arguments(parser)
    submission.add_slurm_arguments(parser)
    overrides = [*NARROW, *TRAINABLE, f"train.output_dir={tmp_path / 'run'}"]
    arguments = ["--method", "moco", "--detector", FPN, "--slurm", "partition=main", *overrides]
    submission.submit_training(parser.parse_intermixed_args(arguments), "tools/pretrain_net.py")
    (((job,), *_, files),) = submitted
    ((path, text),) = files.items()
    assert job.arguments == ["--config-file", path]
    saved = tmp_path / "saved.yaml"
    saved.write_text(text)
    assert changed_keys(load_config(str(saved)), load_method("moco", FPN, overrides)) == {}
