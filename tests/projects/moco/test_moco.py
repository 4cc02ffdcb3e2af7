"""MoCo v2: loss, two processes, recipes and checkpoints."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from fvcore.common.param_scheduler import ConstantParamScheduler
from project_runs import six_steps, two_view_batch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.processes import leave_process_group
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.norms import use_sync_batchnorm
from region_pretrain.modeling.queue import KeyQueue
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.moco import MoCo

CONFIGS = CONFIG_ROOT.parent / "projects/MoCo/configs"


def small_moco(**overrides) -> MoCo:
    torch.manual_seed(0)
    detector = get_config("common/models/mask_rcnn_fpn_small.py").model
    arguments = dict(
        backbone=Trunk(bottom_up=instantiate(detector.backbone.bottom_up)),
        feature="res5",
        head=MLPHead(192, 32, 16, norm=""),
        queue=KeyQueue(10, 16),
        momentum=ConstantParamScheduler(0.9),
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format="RGB",
    )
    return MoCo(**{**arguments, **overrides})


def test_loss_against_stock_cross_entropy():
    model, batch = small_moco().eval(), two_view_batch()
    with torch.no_grad():
        for parameter in model.key.parameters():
            parameter.mul_(1.05)
        vectors = []
        for network, view in zip((model.query, model.key), batch.views, strict=True):
            images = (view.images.float() - model.preprocess.pixel_mean) / (
                model.preprocess.pixel_std
            )
            last = network["backbone"].bottom_up(images)["res5"].mean(dim=(2, 3))
            vectors.append(F.normalize(network["head"](last), dim=1))
        query, key = vectors
        losses = []
        for i in range(4):
            logits = torch.cat([(query[i] @ key[i])[None], model.queue.keys @ query[i]]) / 0.2
            losses.append(F.cross_entropy(logits[None], torch.tensor([0])))
        assert model(batch)["loss_image"].item() == pytest.approx(np.mean(losses), abs=1e-5)
        assert model.queue.pointer == 0  # only training fills it


def test_queries_learn_and_the_key_network_follows():
    model = small_moco().train()
    start = {n: p.clone() for n, p in model.key.named_parameters()}
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.add_(1.0)
    with EventStorage():
        model.before_step(0, 10)
    for name, parameter in model.key["head"].named_parameters():
        torch.testing.assert_close(parameter, start[f"head.{name}"] + 0.1)
    model(two_view_batch())["loss_image"].backward()
    assert all(p.grad is None for p in model.key.parameters())
    assert all(p.grad.abs().sum() > 0 for m in model.query.values() for p in m.parameters())
    assert model.queue.pointer == 4


#: Shuffling -> images that a norm sees together: two groups of one process, or one of each.
SHUFFLES = {False: None, True: None, "groups": 4}


def _step(model, batch, module):
    with EventStorage():
        module.before_step(5, 10)
    loss = model(batch)["loss_image"]
    loss.backward()
    gradients = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    return loss.detach(), gradients, module.queue.keys, module.queue.pointer


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    found = {}
    for shuffle in SHUFFLES:
        model = use_sync_batchnorm(torch.load(f"{folder}/{shuffle}.pt", weights_only=False))
        wrapped = DistributedDataParallel(model, broadcast_buffers=False)
        loss, *rest = _step(wrapped, two_view_batch(8).chunk(2)[rank], model)
        dist.all_reduce(loss)
        found[shuffle] = (loss / 2, *rest)
    own = small_moco().train()  # statistics per process
    found["shuffled"] = own._keys(two_view_batch(8).chunk(2)[rank].views[1])
    own.shuffling.enabled = False
    found["straight"] = own._keys(two_view_batch(8).chunk(2)[rank].views[1])
    torch.save(found, f"{folder}/{rank}.pt")
    leave_process_group()


def test_two_processes_are_one_with_equal_or_fixed_statistics(tmp_path):
    one = {}
    for shuffle, size in SHUFFLES.items():
        model = small_moco(shuffle=bool(shuffle), norm_batch_size=size)
        if shuffle is True:
            for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
                norm.eval()
                norm.running_var.fill_(2.0)
        torch.save(model, tmp_path / f"{shuffle}.pt")
        one[shuffle] = _step(model, two_view_batch(8), model)
    spawn(_rank, (str(tmp_path),), nprocs=2)
    two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for shuffle, (loss, gradients, keys, pointer) in one.items():
        for found in two:
            torch.testing.assert_close(found[shuffle][0], loss, rtol=1e-4, atol=2e-5)
            norm = torch.stack([g.norm() for g in gradients.values()]).norm()
            for name, value in gradients.items():
                difference = (found[shuffle][1][name] - value).norm()
                assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name
            torch.testing.assert_close(found[shuffle][2], keys, rtol=1e-3, atol=1e-4)
            assert found[shuffle][3] == pointer == 8
    for found in two:  # a batch of other images has other statistics, hence another key
        assert not torch.allclose(found["shuffled"], found["straight"], atol=1e-3)


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "iterations"),
    [
        ("moco-v2_r50_8xb32-200ep_imagenet", 200, 0.03, 1_000_800),
        ("moco-v2_r50_8xb32-800ep_coco", 800, 0.3, 369_600),
    ],
)
def test_values_of_the_recipes(name, epochs, lr, iterations):
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    batch = cfg.dataloader.train.total_batch_size
    assert (cfg.train.epochs, batch, cfg.optimizer.lr) == (epochs, 256, lr)
    images = 118_287 if "coco" in name else 1_281_167
    assert images // batch * epochs == iterations and cfg.train.base_batch_size == 256
    assert (cfg.optimizer.momentum, cfg.optimizer.weight_decay) == (0.9, 1e-4)
    model, views = cfg.model, cfg.dataloader.train.dataset.views
    assert (model.queue.length, model.queue.dim, model.temperature) == (65_536, 128, 0.2)
    assert instantiate(model.momentum)(0.5) == 0.999 and model.shuffle
    multiplier = instantiate(cfg.lr_multiplier)
    assert [multiplier(x) for x in (0.0, 0.5, 1.0)] == pytest.approx([1, 0.5, 0], abs=1e-6)
    assert tuple(views.crop_area) == (0.2, 1.0) and views.size == 224
    for light in (views.first_photometry, views.second_photometry):
        strength = (light.brightness, light.contrast, light.saturation, light.hue)
        assert strength == (0.4, 0.4, 0.4, 0.1) and tuple(light.blur_sigma) == (0.1, 2.0)
        assert (light.jitter_prob, light.gray_prob, light.blur_prob) == (0.8, 0.2, 0.5)
    with torch.device("meta"):
        head = instantiate(model.head)
    assert [type(m) for m in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert sum(p.numel() for p in head.parameters()) == 4_458_624


@pytest.fixture
def run(region_folder, tmp_path):
    def start(name: str, *overrides: str, resume: bool = False) -> Path:
        cfg = six_steps(
            CONFIGS / "moco-v2_r18_b32_shapes.py",
            region_folder.images,
            tmp_path / name,
            "dataloader.train.dataset.views.size=32",
            "model.queue.length=32",
            "train.max_iter=4",
            *overrides,
        )
        do_pretrain(cfg, resume=resume)
        return tmp_path / name

    return start


def test_a_checkpoint_contains_the_trunk_and_the_log_says_so(run, caplog):
    with caplog.at_level(logging.INFO):
        folder = run("contract")
    assert "backbone.bottom_up only" in caplog.text + (folder / "log.txt").read_text()
    path = str(folder / "model_final.pth")
    saved = torch.load(path, weights_only=True)
    recipe = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    detector = instantiate(recipe.model)
    trunk = {n for n in detector.state_dict() if n.startswith("backbone.bottom_up.")}
    assert set(saved["model"]) == trunk
    report = load_pretrained(detector, path)
    loaded = {n for n, count in report.modules.items() if count.loaded_tensors}
    assert loaded == {"backbone.bottom_up"} and not report.unexpected
    assert {"queue.keys", "queue.pointer", "head.0.weight"} <= set(saved["pretraining"])


def test_a_stopped_run_resumes_bit_for_bit(run):
    def losses(folder):
        lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
        return {line["iteration"]: line["total_loss"] for line in lines}

    whole = losses(run("whole"))
    parts = run("parts")
    (parts / "model_final.pth").unlink()
    (parts / "last_checkpoint").write_text("model_0000001.pth")
    (parts / "model_0000003.pth").unlink(missing_ok=True)
    run("parts", resume=True)
    assert "after iteration 1" in (parts / "log.txt").read_text()
    assert losses(parts) == whole and len(whole) == 4


def test_errors_name_the_wrong_value():
    with pytest.raises(UserError, match="model.temperature=0.0 must be positive"):
        small_moco(temperature=0.0)
    with pytest.raises(UserError, match="model.feature=res6 must be one of res2, res3"):
        small_moco(feature="res6")
