import os

import pytest
from detectron2.config import LazyCall as L
from omegaconf import OmegaConf
from torch import nn

from region_pretrain.config import CONFIG_ROOT, complete_train, load_config
from region_pretrain.errors import UserError
from region_pretrain.overrides import apply_overrides, dotted_keys
from region_pretrain.shipped import ROOT


def make_config():
    return OmegaConf.create(
        {
            "model": L(nn.Linear)(in_features=3, out_features="${train.width}"),
            "train": {"width": 4, "max_iter": None, "amp": {"enabled": False}, "steps": [1, 2]},
            "dataloader": {"train": {"num_workers": 2}, "test": {"num_workers": 2}},
            "same": "${train}",
        },
        flags={"allow_objects": True},
    )


def test_known_keys_are_set_in_hydras_grammar():
    cfg = apply_overrides(
        make_config(),
        [
            "train.max_iter=100",  # null before
            "train.amp.enabled=true",
            "train.steps=[3,4,5]",
            "train.steps.1=7",
            "model.out_features=9",  # an interpolation before
            "same.width=5",  # through an interpolation
        ],
    )
    assert cfg.train.max_iter == 100
    assert cfg.train.amp.enabled is True
    assert cfg.train.steps == [3, 7, 5]
    assert cfg.model.out_features == 9
    assert cfg.same.width == 5


@pytest.mark.parametrize(
    "path", ["/home/Doe, John/a b/run", "./a,b", "../a, b/c.yaml", "C:\\Doe, John\\run", "/a,b,c"]
)
def test_a_path_may_contain_commas(path):
    cfg = complete_train(OmegaConf.create({"train": {"output_dir": "x", "init_checkpoint": ""}}))
    apply_overrides(cfg, [f"train.output_dir={path}", f"train.init_checkpoint={path}"])
    assert cfg.train.output_dir == cfg.train.init_checkpoint == path
    apply_overrides(cfg, ["train.output_dir=~/a, b"])
    assert cfg.train.output_dir == os.path.expanduser("~/a, b")
    with pytest.raises(UserError, match="write a list as train.output_dir="):
        apply_overrides(cfg, ["train.output_dir=a,b"])


def test_new_keys_need_a_plus():
    cfg = apply_overrides(make_config(), ["+model.bias=false", "+train.clip={max_norm: 1.0}"])
    assert cfg.model.bias is False and cfg.train.clip.max_norm == 1.0


def test_a_key_can_be_removed():
    """So that another class, which lacks some arguments, can take the place of a lazy object's."""
    cfg = make_config()
    cfg.optimizer = {"_target_": "torch.optim.SGD", "lr": 0.1, "momentum": 0.9}
    apply_overrides(
        cfg, ["optimizer._target_=torch.optim.AdamW", "~optimizer.momentum", "~train.amp"]
    )
    assert cfg.optimizer == {"_target_": "torch.optim.AdamW", "lr": 0.1}
    assert "amp" not in cfg.train and "width" in cfg.train


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.max_iters=3", r"no key 'train.max_iters'.*did you mean train.max_iter"),
        ("num_workers=3", r"did you mean dataloader.train.num_workers, dataloader.test.num_worke"),
        ("trian.width=3", r"did you mean train.width"),
        ("train.width.deep=3", r"no key 'train.width.deep'"),
        ("train.steps.2=3", r"no key 'train.steps.2'"),
        ("zzz=3", r"no key 'zzz' in the config; to add it: \+zzz="),
        ("train.amp=true", r"train.amp is a group.*train.amp.enabled"),
        ("train.width", r"'train.width' is not of the form key=value"),
        ("~train.widht", r"no key 'train.widht' in the config; did you mean train.width"),
        ("~train.steps.0", r"'~train.steps.0': only keys of groups can be removed"),
        ("~train.width=3", r"'~train.width=3': write ~train.width to remove the key"),
        ("--resume", r"'--resume' is not of the form"),
    ],
)
def test_invalid_overrides_are_refused_with_a_hint(override, message):
    cfg = make_config()
    with pytest.raises(UserError, match=message):
        apply_overrides(cfg, [override])
    assert cfg == make_config()


def test_an_interpolation_without_a_value_is_refused(monkeypatch):
    monkeypatch.setenv("SCRATCH", "/scratch")
    cfg = make_config()
    cfg.train.output_dir = "output"
    apply_overrides(cfg, ["train.output_dir=${oc.env:SCRATCH}/${new}", "+new=3"])
    assert cfg.train.output_dir == "/scratch/3"
    for override, message in (
        ("train.output_dir=${SCRATCH}/a", r"'SCRATCH' not found; write \$\{oc.env:SCRATCH\}, or "),
        ("train.width=${nope}", r"'train.width=\$\{nope\}': Interpolation key 'nope' not found$"),
        ("train.output_dir=${oc.env:NO_SUCH}", r"Environment variable 'NO_SUCH' not found"),
        ("train.steps=[1,'${nope}']", r"Interpolation key 'nope' not found"),
        ("+train.new={a: '${nope:}'}", r"Unsupported interpolation type nope"),
    ):
        with pytest.raises(UserError, match=f"^override .*{message}"):
            apply_overrides(make_config() if "output" not in override else cfg.copy(), [override])


def test_a_group_may_be_replaced_by_a_group_or_null():
    cfg = apply_overrides(make_config(), ["train.amp={enabled: true}", "dataloader.test=null"])
    assert cfg.train.amp.enabled is True and cfg.dataloader.test is None


@pytest.mark.parametrize(
    "text, expected",
    [
        ("out/Größe", "out/Größe"),
        ("out/lr=0.1", "out/lr=0.1"),
        ("out/my run (2)", "out/my run (2)"),
        ("20240501", "20240501"),
        ("1e-3", "1e-3"),
        ("true", "true"),
        ("C:\\runs", "C:\\runs"),
        (r"\\server\share\my run", r"\\server\share\my run"),
        ("'quoted=1'", "quoted=1"),
        ("${same.width}", "${same.width}"),
        ("~/runs", os.path.expanduser("~/runs")),
        ("'~/runs'", os.path.expanduser("~/runs")),
        ("null", None),
    ],
)
def test_text_is_taken_literally_where_the_config_has_text(text, expected):
    cfg = make_config()
    cfg.train.output_dir = "output"
    apply_overrides(cfg, [f"train.output_dir={text}"])
    assert OmegaConf.to_container(cfg, resolve=False)["train"]["output_dir"] == expected


@pytest.mark.parametrize(
    "override", ["train.output_dir='open", "train.output_dir=[a,b", "train.width=a=b"]
)
def test_broken_structures_are_not_taken_literally(override):
    cfg = make_config()
    cfg.train.output_dir = "output"
    with pytest.raises(UserError, match="is not of the form key=value"):
        apply_overrides(cfg, [override])


def test_null_and_new_keys_may_become_unusual_text():
    cfg = make_config()
    cfg.train.regions = None
    apply_overrides(cfg, ["train.regions=Größe.arrow", "+train.note=50%=half"])
    assert (cfg.train.regions, cfg.train.note) == ("Größe.arrow", "50%=half")


@pytest.mark.parametrize("value", ["folder://base", "folder://Größe", "[folder://a,folder://b]"])
def test_a_computed_value_may_be_replaced(value):
    cfg = make_config()
    cfg.train.names = L(nn.Linear)(in_features=1, out_features=1)
    apply_overrides(cfg, [f"train.names={value}"])
    expected = value if value[0] != "[" else ["folder://a", "folder://b"]
    assert cfg.train.names == expected


@pytest.mark.parametrize("value", ["off", "on", "yes", "1", "0", "False_"])
def test_booleans_must_be_booleans(value):
    with pytest.raises(UserError, match=f"train.amp.enabled={value}: must be true or false"):
        apply_overrides(make_config(), [f"train.amp.enabled={value}"])


def test_dotted_keys_lists_groups_and_leaves():
    assert list(dotted_keys({"a": {"b": [1, {"c": 2}]}})) == [
        "a",
        "a.b",
        "a.b.0",
        "a.b.1",
        "a.b.1.c",
    ]


@pytest.mark.parametrize(
    "override, message",
    [
        ("train.output_dir=null", "train.output_dir=null: must be text"),
        ("train.init_checkpoint=null", "train.init_checkpoint=null: must be text"),
        ("train.hooks=null", "train.hooks=null: must be a list"),
        ("train.amp=null", "train.amp=null: must be a group of keys"),
        ("train.amp.enabled=null", "train.amp.enabled=null: must be true or false"),
        ("train.log_period=null", "train.log_period=null: must be a number"),
        ("train.eval_period=-1", "train.eval_period=-1: must not be negative"),
        ("train.max_iter=-5", "train.max_iter=-5: must not be negative"),
        (
            "train.clip_grad={enabled: true, max_norm: 0}",
            "train.clip_grad.max_norm=0: must be positive; enabled=false does not clip",
        ),
        ("train.clip_grad={enabled: true, max_value: 0}", "clip_grad.max_value=0: must be posi"),
        ("train.epochs=true", "train.epochs=True: must be a number"),
        ("train.clip_grad.max_value=abc", "train.clip_grad.max_value=abc: must be a number"),
        ("train.clip_grad.max_value=[1]", "train.clip_grad.max_value=\\[1\\]: must be a number"),
        ("train.accumulate_steps=1.5", "train.accumulate_steps=1.5: must be a whole number"),
        ("train.max_iter=1e5", "train.max_iter=100000.0: must be a whole number"),
        ("+train.checkpointer.keep_last=3", "checkpointer.keep_last: there is no such key; it has"),
        ("train.seed=0.5", "train.seed=0.5: must be a whole number"),
        ("dataloader.train.num_workers=-1", "num_workers=-1: must be a whole number, at least 0"),
        ("dataloader.train.num_workers=1.5", "num_workers=1.5: must be a whole number"),
        ("dataloader.train.total_batch_size=0", "total_batch_size=0: .* at least 1"),
        ("dataloader.test.batch_size=0", "dataloader.test.batch_size=0: .* at least 1"),
    ],
)
def test_values_of_another_type_are_refused_before_anything_is_computed(override, message):
    path = str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py")
    with pytest.raises(UserError, match=message):
        load_config(path, [override])


def test_a_null_device_is_the_gpu_if_there_is_one():
    path = str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py")
    assert load_config(path, ["train.device=null"]).train.device is None


def test_a_config_from_python_is_checked_as_well():
    cfg = OmegaConf.create({"train": {"amp": {"enabled": "off"}}})
    with pytest.raises(UserError, match="train.amp.enabled=off: must be true or false"):
        complete_train(cfg)


@pytest.mark.parametrize("key", ["epochs", "max_iter", "seed", "base_batch_size"])
def test_numbers_that_may_be_null(key):
    path = str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py")
    assert load_config(path, [f"train.{key}=null"]).train[key] is None
    assert load_config(path, [f"train.{key}=3"]).train[key] == 3


def test_the_home_folder_in_a_config_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("train = dict(output_dir='~/runs/1')\n")
    assert load_config(str(path)).train.output_dir == os.path.expanduser("~/runs/1")


FASTER_RCNN = CONFIG_ROOT / "detection/faster_rcnn_r18_fpn_shapes.py"
MOCO = ROOT / "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
CCOP = ROOT / "projects/CCOP/configs/ccop_r50-fpn_8xb32-200ep_coco.py"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.py"
GROUP = "is a group, not a value; its keys: model.momentum"


@pytest.mark.parametrize(
    ("config", "override", "message"),
    [
        (FASTER_RCNN, "dataloader.train.total_batch_size=null", "null: must be a number"),
        (FASTER_RCNN, "dataloader.test.num_workers=null", "null: must be a number"),
        (FASTER_RCNN, "optimizer.lr=null", "null: must be a number"),
        (FASTER_RCNN, "dataloader.train.dataset.names=null", "null: must name a data set"),
        (FASTER_RCNN, "model.pixel_mean=3", "3: must be a list"),
        (FASTER_RCNN, "model.pixel_mean=abc", "abc: must be a list of numbers"),
        (MOCO, "lr_multiplier.warmup_epochs=null", "null: must be a number"),
        (MOCO, "dataloader.train.dataset.names=null", "null: must name a data set"),
        (MOCO, "dataloader.train.dataset.views.crop_area=0.5", "0.5: must be a list"),
        (MOCO, "model.pixel_std=3", "3: must be a list"),
        (MOCO, "model.momentum=abc", GROUP),
        (MOCO, "model.backbone=abc", "is a group, not a value"),
    ],
)
def test_values_of_another_kind_than_an_argument_are_refused(config, override, message):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"^{key}[= ]{message}"):
        load_config(str(config), [override])


@pytest.mark.parametrize(
    ("config", "override"),
    [
        (FASTER_RCNN, "model.roi_heads.num_classes=null"),
        (FASTER_RCNN, "optimizer.params.weight_decay_norm=null"),  # an Optional
        (RETINANET, "dataloader.train.mapper.augmentations.0.short_edge_length=100"),
        (FASTER_RCNN, "dataloader.train.dataset.names=mine"),
        (FASTER_RCNN, "model.pixel_mean=${model.pixel_std}"),
        (CCOP, "model.region_head.init_std=null"),
        (MOCO, "model.momentum.value=0.5"),
    ],
)
def test_values_of_another_kind_that_an_argument_accepts(config, override):
    load_config(str(config), [override])
