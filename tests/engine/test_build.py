import logging
import platform
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.config import instantiate
from detectron2.model_zoo import get_config as get_detectron2_config
from tiny_run import Loader, NoisyMapper, make_config, records
from torch import nn

from region_pretrain.config import complete_train, get_config
from region_pretrain.data.few_label import random_fraction
from region_pretrain.data.loader import PretrainLoader
from region_pretrain.engine import build
from region_pretrain.engine.build import (
    TrainingData,
    build_model,
    build_optimizer,
    build_part,
    check_batch_size,
    clipping,
    log_schedule,
    resolve_device,
    scale_lr,
    warn_of_few_steps,
    warn_of_long_queues,
    wrap_model,
)
from region_pretrain.engine.detection_data import DetectionTrainData
from region_pretrain.errors import UserError
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.solver.schedules import warmup_multistep


def config(**train):
    return complete_train(make_config("unused", **train))


@pytest.mark.parametrize("batch, lr", [(512, 2.0), (1024, 4.0), (2048, 8.0), (4096, 16.0)])
def test_learning_rate_is_linear_in_the_batch(batch, lr, caplog):
    cfg = config(base_batch_size=256, epochs=100)
    cfg.optimizer.lr = 1.0
    with caplog.at_level(logging.INFO):
        data = Loader(batch, num_images=625 * batch)
        assert scale_lr(cfg, data, max_iter=62500) == lr
    assert f"lr 1 * {batch} / 256 = {lr:g}, 100 epochs * 625 = 62500 iterations" in caplog.text


@pytest.mark.parametrize(
    ("batch", "epochs", "hint"),
    [
        (8, None, "; as many images as at batch size 16: train.max_iter=1800"),
        (16, None, ""),
        (8, 20, ""),  # of a pre-training, whose base is that of the learning rate only
    ],
)
def test_a_smaller_batch_needs_more_iterations(batch, epochs, hint, caplog):
    cfg = config(base_batch_size=16, max_iter=900, epochs=epochs)
    caplog.set_level(logging.INFO)
    scale_lr(cfg, Loader(batch, num_images=10 * batch), max_iter=900)
    (line,) = caplog.messages
    assert line.partition("iterations of ")[2] == f"{batch} images = 90 epochs{hint}"


@pytest.mark.parametrize(
    ("batch", "hint"), [(4, "4 images instead of 16, optimizer.lr=0.005"), (16, "")]
)
def test_a_yacs_configs_learning_rate_is_not_scaled_without_a_word(batch, hint, caplog):
    cfg = config(max_iter=900, base_batch_size=None)
    cfg.model = {"cfg": {"SOLVER": {"IMS_PER_BATCH": 16}}}
    cfg.optimizer.lr = 0.02
    assert scale_lr(cfg, Loader(batch, num_images=10 * batch), max_iter=900) == 0.02
    warned = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert len(warned) == bool(hint) and hint in "".join(warned)


SHORT_WARMUP = (
    "the warm-up of 1000 of 90000 iterations has become one of 10 of 900: "
    "+lr_multiplier.warmup_iters=10000 makes it 100"
)
RELATIVE_STEPS = (
    "lr_multiplier.steps=[600, 800] are iterations of a run of lr_multiplier.max_iter=90000: this "
    "run of 900 has its drops at [6, 8]; if its own iterations are meant, set "
    "lr_multiplier.max_iter=900"
)


@pytest.mark.parametrize(
    ("max_iter", "changes", "line", "warnings"),
    [
        (90_000, {}, "warm-up until iteration 1000; drops at 60000, 80000", []),
        (900, {}, "warm-up until iteration 10; drops at 600, 800", [SHORT_WARMUP]),
        (900, {"warmup_iters": 10_000}, "warm-up until iteration 100; drops at 600, 800", []),
        (900, {"warmup_iters": 0}, "drops at 600, 800", []),
        (90, {}, "warm-up until iteration 1; drops at 60, 80", []),  # a trial
        (
            200,
            {},
            "warm-up until iteration 2; drops at 134, 178",
            [
                "the warm-up of 1000 of 90000 iterations has become one of 2 of 200: "
                "+lr_multiplier.warmup_iters=18000 makes it 40"
            ],
        ),
        (
            900,
            {"steps": [600, 800], "warmup_iters": 10_000},
            "warm-up until iteration 100; drops at 6, 8",
            [RELATIVE_STEPS],
        ),
        (
            900,
            {"steps": [600, 800], "max_iter": 900, "warmup_iters": 50},
            "warm-up until iteration 50; drops at 600, 800",
            [],
        ),
    ],
)
def test_the_schedule_of_a_short_run_is_logged(max_iter, changes, line, warnings, caplog):
    cfg = get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py")
    cfg.lr_multiplier.update(changes)
    caplog.set_level(logging.INFO)
    log_schedule(cfg, instantiate(cfg.lr_multiplier), max_iter)
    assert caplog.messages == [f"learning rate: {line}", *warnings]


def test_the_schedule_of_a_short_run_of_a_stock_config(caplog):
    cfg = get_detectron2_config("COCO-Detection/retinanet_R_50_FPN_1x.py")
    caplog.set_level(logging.WARNING, "region_pretrain")
    log_schedule(cfg, instantiate(cfg.lr_multiplier), 900)
    assert caplog.messages == [
        "the warm-up of 1000 of 90000 iterations has become one of 10 of 900: "
        "lr_multiplier.warmup_length=0.111 makes it 100"
    ]
    cfg.lr_multiplier.warmup_length = 0.111
    caplog.clear()
    log_schedule(cfg, instantiate(cfg.lr_multiplier), 900)
    assert caplog.messages == []
    cfg.lr_multiplier = L(warmup_multistep)(max_iter=90_000, steps=[])
    log_schedule(cfg, instantiate(cfg.lr_multiplier), 900)


def test_every_process_builds_the_same_model_then_draws_its_own_numbers(monkeypatch):
    weights, noise = [], []
    for rank in range(2):
        monkeypatch.setattr(build.comm, "get_rank", lambda rank=rank: rank)
        weights.append(build_model(config(seed=5), torch.device("cpu")).backbone[0].weight)
        noise.append(torch.rand(1))
    assert torch.equal(*weights)
    assert not torch.equal(*noise)


def test_channels_last_reaches_convolutions():
    cfg = config(channels_last=True)
    cfg.model = {
        "_target_": "torch.nn.Conv2d",
        "in_channels": 3,
        "out_channels": 4,
        "kernel_size": 3,
    }
    model = build_model(cfg, torch.device("cpu"))
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert not model.weight.is_contiguous()


def test_compiled_models_keep_their_names(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda call, **kw: compiled.append(call) or call)
    cfg = config(compile=True)
    model = build_model(cfg, torch.device("cpu"))
    names = list(model.state_dict())
    assert wrap_model(cfg, model, torch.device("cpu")) is model
    assert len(compiled) == 1 and list(model.state_dict()) == names


def test_optimizer_gets_the_scaled_lr_and_leaves_the_config_alone():
    cfg = config()
    model = build_model(cfg, torch.device("cpu"))
    optimizer = build_optimizer(cfg, model, lr=0.25)
    assert [g["lr"] for g in optimizer.param_groups] == [0.25, 0.25]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 4
    assert "model" not in cfg.optimizer.params and cfg.optimizer.lr == 2.0


def predictor_only(model):
    return [{"params": list(model.predictor.parameters())}]


def test_parameter_groups_have_all_that_is_trained():
    cfg = config()
    cfg.optimizer.params = L(predictor_only)()
    model = build_model(cfg, torch.device("cpu"))
    with pytest.raises(UserError) as error:
        build_optimizer(cfg, model, lr=1)
    assert str(error.value) == (
        "optimizer.params: predictor_only leaves out 2 of 4 trained parameters "
        "(backbone.0.weight, backbone.0.bias): put them into a group, or freeze them in the model "
        "(requires_grad_(False))"
    )
    model.backbone.requires_grad_(False)
    assert len(build_optimizer(cfg, model, lr=1).param_groups) == 1


@pytest.mark.parametrize(
    "amp, device, expected",
    [
        ({"enabled": False, "dtype": "float16"}, "cuda", None),
        ({"enabled": True, "dtype": "float16"}, "cuda", torch.float16),
        ({"enabled": True, "dtype": "bfloat16"}, "cuda", torch.bfloat16),
        ({"enabled": True, "dtype": "bfloat16"}, "cpu", torch.bfloat16),
        ({"enabled": True, "dtype": "float16"}, "cpu", torch.bfloat16),
    ],
)
def test_precision(amp, device, expected):
    assert build.amp_dtype(amp, torch.device(device)) is expected


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "device, fast, warnings", [("cpu", False, 1), ("cpu", True, 0), ("meta", False, 0)]
)
def test_a_cpu_that_emulates_bfloat16_is_named(monkeypatch, caplog, dtype, device, fast, warnings):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: fast)
    for enabled in (False, True):
        build.amp_dtype({"enabled": enabled, "dtype": dtype}, torch.device(device))
    text = "slower than float32: set train.amp.enabled=false"
    assert caplog.text.count(text) == warnings


@pytest.mark.skipif(
    (platform.system(), platform.machine()) != ("Linux", "x86_64"), reason="reads /proc/cpuinfo"
)
def test_emulation_of_bfloat16_agrees_with_the_flags_of_the_processor():
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    fast = {"avx512vl", "avx512bw", "avx512dq"} <= set(flags)
    assert build.emulates_bfloat16(torch.device("cpu")) is not fast


@pytest.mark.parametrize(
    "clip, expected",
    [
        ({"enabled": False, "max_norm": 1.0, "max_value": 2.0}, {}),
        ({"enabled": True, "max_norm": 1.0, "max_value": None}, {"max_norm": 1.0}),
        ({"enabled": True, "max_norm": 1.0, "max_value": 2.0}, {"max_value": 2.0}),
    ],
)
def test_clipping(clip, expected):
    assert clipping(clip) == expected


def test_a_batch_that_cannot_be_shared_is_refused(monkeypatch):
    monkeypatch.setattr(build.comm, "get_world_size", lambda: 3)
    with pytest.raises(UserError, match="total_batch_size=8 must be a multiple of the 3"):
        check_batch_size(config(), Loader(8))


class Queues(nn.Module):
    def __init__(self):
        super().__init__()
        self.queue, self.region_queue = KeyQueue(101, 2), KeyQueue(101, 2)
        self.region_queue.of_images = False


def test_a_queue_that_is_longer_than_the_data_set_is_named(caplog):
    warn_of_long_queues(Loader(8, num_images=112), Queues())
    assert caplog.messages == []
    warn_of_long_queues(Loader(8, num_images=103), Queues())  # 12 full batches
    assert caplog.messages == [
        "model.queue.length=101 is more than the 96 images of an epoch: other views of an image "
        "are among its own negatives; lower it, e.g. to half of them (48)"
    ]


def test_few_steps_of_a_large_batch_are_named(caplog):
    warn_of_few_steps(Loader(1024, num_images=5000), 5000)
    warn_of_few_steps(Loader(256, num_images=5000), 400)  # also few, but from small batches
    assert caplog.messages == []
    warn_of_few_steps(Loader(1024, num_images=5000), 400)
    assert caplog.messages == [
        "400 steps of 1024 images are few: the recipes have tens of thousands. For the 4096 images "
        "of an epoch, lower dataloader.train.total_batch_size, e.g. to 256, and raise train.epochs"
    ]


def test_sync_batch_norm_stays_where_one_process_runs():
    cfg = config()
    cfg.model.norm = "SyncBN"
    assert isinstance(build_model(cfg, torch.device("cpu")).backbone[1], nn.SyncBatchNorm)


def test_an_unfinished_method_is_an_error_that_names_what_it_lacks():
    cfg = config()
    cfg.model = {"_target_": "tiny_run.Unfinished"}
    with pytest.raises(UserError, match="^model: Can't instantiate abstract class Unfin.*forward"):
        build_model(cfg, torch.device("cpu"))


def test_an_argument_that_a_class_lacks_is_named_and_other_errors_are_not_the_users():
    cfg = config()
    cfg.model.noize = 1
    with pytest.raises(UserError, match=r"^model: .*keyword argument 'noize': remove it from the"):
        build_model(cfg, torch.device("cpu"))
    multiplier = get_detectron2_config("common/coco_schedule.py").lr_multiplier_1x
    multiplier.warmup_iters = 9
    with pytest.raises(UserError, match=r"^lr_multiplier: .*keyword argument 'warmup_iters'"):
        build_part(multiplier, "lr_multiplier")
    cfg = config()
    cfg.optimizer = L(torch.optim.AdamW)(params=cfg.optimizer.params, lr=1, momentum=0.9)
    with pytest.raises(UserError, match=r"^optimizer: .*keyword argument 'momentum': remove it"):
        build_optimizer(cfg, build_model(cfg, torch.device("cpu")), lr=1)
    dataset = L(random_fraction)(names="x", fraction=0.5)
    with pytest.raises(UserError, match=r"^a.b: random_fraction.* argument: 'seed': add it to the"):
        build_part({"_target_": "builtins.list", "within": [dataset]}, "a.b")
    cfg = config()
    cfg.model = {"_target_": "builtins.int", "base": "x"}
    with pytest.raises(TypeError):
        build_model(cfg, torch.device("cpu"))


def test_the_librarys_loaders_are_training_data(pretrain_dataset):
    for data in (
        PretrainLoader(pretrain_dataset, 4, num_workers=0),
        DetectionTrainData(records(), NoisyMapper(), 4),
    ):
        assert isinstance(data, TrainingData)
    assert not isinstance([], TrainingData)


def test_device(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device(None) == resolve_device("cpu") == torch.device("cpu")
    assert not caplog.records
    assert resolve_device("cuda") == torch.device("cpu")
    assert "this machine has no CUDA GPU" in caplog.text
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert resolve_device(None) == resolve_device("cuda") == torch.device("cuda", 3)
    assert resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="train.device=gpu"):
        resolve_device("gpu")


def _calls_wrongly(a: int = 1) -> None:
    sorted([a], revers=True)


class _NeedsMore:
    def __init__(self, a: int, b: int) -> None:
        pass


def _forgets(a: int = 1) -> None:
    _NeedsMore(a)


def test_an_error_within_the_code_that_a_config_calls_is_not_blamed_on_the_config():
    for wrong in (_calls_wrongly, _forgets):
        with pytest.raises(TypeError, match="revers|missing 1 required"):
            build_part(L(wrong)(a=2), "dataloader.train")
    with pytest.raises(UserError, match=r"^x: .*missing 1 required.*'b': add it to the config"):
        build_part(L(_NeedsMore)(a=1), "x")
