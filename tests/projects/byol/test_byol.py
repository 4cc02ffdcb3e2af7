"""BYOL: its loss, two processes, its recipes and its checkpoints."""

import numpy as np
import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from project_runs import two_view_batch
from torch import distributed as dist
from torch import nn
from torch.multiprocessing import spawn
from torch.nn.parallel import DistributedDataParallel

from region_pretrain.config import CONFIG_ROOT, apply_overrides, get_config
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.norms import use_cpu_sync_batchnorm
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.byol import BYOL
from region_pretrain.solver import cosine_momentum

CONFIGS = CONFIG_ROOT.parent / "projects/BYOL/configs"


def small_byol() -> BYOL:
    torch.manual_seed(0)
    detector = get_config("common/models/mask_rcnn_fpn_small.py").model
    return BYOL(
        backbone=Trunk(instantiate(detector.backbone.bottom_up)),
        projector=MLPHead(192, 32, 16),
        predictor=MLPHead(16, 32, 16),
        momentum=cosine_momentum(0.99),
        pixel_mean=detector.pixel_mean,
        pixel_std=detector.pixel_std,
        input_format="RGB",
    )


def test_loss_is_the_papers_squared_error_less_four():
    model, batch = small_byol().eval(), two_view_batch()
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.mul_(1.05)
        online, target = [], []
        for view in batch.views:
            images = (view.images.float() - model.preprocess.pixel_mean) / (
                model.preprocess.pixel_std
            )
            for network, predictor, found in (
                (model.online, model.predictor, online),
                (model.target, nn.Identity(), target),
            ):
                last = network["backbone"].bottom_up(images)["res5"].mean(dim=(2, 3))
                vectors = predictor(network["projector"](last)).numpy()
                found.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
        squared = [np.sum((online[a] - target[1 - a]) ** 2, axis=1).mean() for a in range(2)]
        assert model(batch)["loss_image"].item() == pytest.approx(sum(squared) - 4, abs=1e-4)


def test_online_learns_and_the_target_follows_the_schedule():
    model = small_byol().train()
    start = {n: p.clone() for n, p in model.target.named_parameters()}
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(1.0)
    with EventStorage():
        model.before_step(250, 1000)
    moved = 1 - 0.991464  # 0.01 * (1 + cos(pi / 4)) / 2
    for name, parameter in model.target["projector"].named_parameters():
        expected = start[f"projector.{name}"] + moved
        torch.testing.assert_close(parameter, expected, rtol=0, atol=1e-6)
    model(two_view_batch())["loss_image"].backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name


def _step(model, batch, module):
    with EventStorage():
        module.before_step(5, 10)
    loss = model(batch)["loss_image"]
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in module.named_parameters() if p.grad is not None}


def _rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    model = use_cpu_sync_batchnorm(small_byol())
    wrapped = DistributedDataParallel(model, broadcast_buffers=False)
    loss, gradients = _step(wrapped, two_view_batch(8).chunk(2)[rank], model)
    dist.all_reduce(loss)
    torch.save((loss / 2, gradients), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path):
    model = small_byol()
    loss, gradients = _step(model, two_view_batch(8), model)
    spawn(_rank, (str(tmp_path),), nprocs=2)
    norm = torch.stack([g.norm() for g in gradients.values()]).norm()
    for rank in range(2):
        other_loss, other_gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(other_loss, loss, rtol=1e-4, atol=2e-5)
        assert other_gradients.keys() == gradients.keys()
        for name, value in gradients.items():
            difference = (other_gradients[name] - value).norm()
            assert difference <= 5e-3 * value.norm() + 1e-4 * norm, name


@pytest.mark.parametrize(
    ("name", "epochs", "lr", "batch", "momentum"),
    [
        ("byol_r50_32xb128-300ep_imagenet", 300, 7.2, 4096, 0.99),
        ("byol_r50_32xb128-1000ep_imagenet", 1000, 3.2, 4096, 0.996),
        ("byol_r50_8xb128-800ep_coco", 800, 1.8, 1024, 0.99),
    ],
)
def test_facts_of_the_recipes(name, epochs, lr, batch, momentum):
    cfg = LazyConfig.load(str(CONFIGS / f"{name}.py"))
    assert cfg.train.epochs == epochs and cfg.dataloader.train.total_batch_size == batch
    assert cfg.optimizer.lr * batch / cfg.train.base_batch_size == pytest.approx(lr)
    assert cfg.optimizer.params.weight_decay == 1.5e-6
    schedule = instantiate(cfg.model.momentum)
    assert schedule(0.0) == momentum and schedule(0.999999) == pytest.approx(1)
    for head, channels in ((cfg.model.projector, 2048), (cfg.model.predictor, 256)):
        assert (head.input_dim, head.hidden_dim, head.output_dim) == (channels, 4096, 256)
    views = cfg.dataloader.train.dataset.views
    first, second = views.first_photometry, views.second_photometry
    for light in (first, second):
        assert (light.brightness, light.contrast, light.saturation) == (0.4, 0.4, 0.2)
        assert (light.hue, light.jitter_prob, light.gray_prob) == (0.1, 0.8, 0.2)
    assert (first.blur_prob, second.blur_prob, second.solarize_prob) == (1.0, 0.1, 0.2)
    assert "solarize_prob" not in first


def test_a_checkpoint_holds_the_trunk_alone(region_folder, tmp_path):
    cfg = apply_overrides(
        LazyConfig.load(str(CONFIGS / "byol_r18_b32_shapes.py")),
        [
            f"train.output_dir={tmp_path / 'run'}",
            f"dataloader.train.dataset.names=folder://{region_folder.images}",
            "dataloader.train.dataset.views.size=32",
            "dataloader.train.total_batch_size=4",
            "dataloader.train.num_workers=0",
            "train.max_iter=2",
            "train.device=cpu",
        ],
    )
    do_pretrain(cfg)
    path = str(tmp_path / "run/model_final.pth")
    recipe = LazyConfig.load(str(CONFIG_ROOT / "detection/mask_rcnn_r18_fpn_shapes.py"))
    report = load_pretrained(instantiate(recipe.model), path)
    loaded = {n for n, c in report.modules.items() if c.loaded_tensors == c.tensors}
    assert loaded == {"backbone.bottom_up"} and not report.unexpected
    assert "backbone.bottom_up only" in (tmp_path / "run/log.txt").read_text()
