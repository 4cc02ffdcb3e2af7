"""SoCo's meta-architecture: losses, gradients, and the modules shared with the detector."""

import functools

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torchvision.ops import roi_align

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.errors import UserError
from region_pretrain.modeling.pyramid import trunk_and_pyramid_features
from region_pretrain.modeling.regions import pool_regions
from region_pretrain.modeling.trunk import compile_trunks
from region_pretrain.projects.soco import SoCo


def total(outputs):
    return sum(v for k, v in outputs.items() if k.startswith("loss"))


def test_names_of_the_full_size_model_are_the_detectors():
    detector = get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model
    recipe = CONFIG_ROOT.parent / "projects/SoCo/configs/soco_r50-fpn_16xb128-100ep_imagenet.py"
    with torch.device("meta"):
        soco = instantiate(LazyConfig.load(str(recipe)).model)
        stock = instantiate(detector)
    mine = {k: v.shape for k, v in soco.state_dict().items() if not k.startswith("target.")}
    theirs = {k: v.shape for k, v in stock.state_dict().items()}
    shared = {k for k in mine if k.startswith(SoCo.detector_modules)}
    assert shared and all(mine[k] == theirs[k] for k in shared)
    transferable = {k for k in theirs if k.startswith(("backbone.", "roi_heads.box_head."))}
    assert shared == transferable
    for name in (
        "backbone.fpn_lateral2.weight",
        "backbone.fpn_lateral2.norm.running_mean",
        "roi_heads.box_head.conv1.weight",
        "roi_heads.box_head.conv1.norm.weight",
        "roi_heads.box_head.fc1.bias",
        "backbone.bottom_up.res5.2.conv3.norm.weight",
        "backbone.bottom_up.stem.conv1.norm.bias",
    ):
        assert name in shared

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(soco.backbone.bottom_up) == 23_508_032
    assert count(soco.backbone) - count(soco.backbone.bottom_up) == 3_346_432
    assert count(soco.roi_heads) == 15_207_424
    assert count(soco.projector) == 5_255_424
    assert count(soco.predictor) == 2_109_696


def test_shapes_of_maps_at_full_size():
    fpn = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.backbone).eval()
    for side, maps in ((224, (56, 28, 14, 7)), (192, (48, 24, 12, 6)), (112, (28, 14, 7, 4))):
        with torch.no_grad():
            _, features = trunk_and_pyramid_features(fpn, torch.randn(1, 3, side, side))
        assert tuple(features[f"p{i}"].shape[-1] for i in range(2, 6)) == maps


def test_pyramid_equals_the_detectors_own_if_sides_are_divisible():
    torch.manual_seed(0)
    fpn = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.backbone).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        own, (_, ours) = fpn(images), trunk_and_pyramid_features(fpn, images)
    assert list(ours) == ["p2", "p3", "p4", "p5"]
    for name, value in ours.items():
        torch.testing.assert_close(value, own[name])


def test_pooling_scales_boxes_by_the_maps_own_size():
    """x from 0.25 to 0.75 of the view is 14 to 42 on a map of 56, and 1 to 3 on a map of 4."""
    pooler = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.roi_heads)
    pooler = pooler.box_pooler

    def ramp(side):
        return torch.arange(side, dtype=torch.float32).add(0.5).expand(1, 1, side, side)

    for view, maps in ((224, (56, 28, 14, 7)), (112, (28, 14, 7, 4))):
        box = torch.tensor([[[0.25, 0.25, 0.75, 0.75]]]) * view
        for level, side in enumerate(maps):
            features = [ramp(s) for s in maps]
            out = pool_regions(features, box, torch.tensor([[level]]), pooler, (view, view))
            # Bin centres of the middle half: 7 bins between side / 4 and 3 side / 4.
            centres = side / 4 + (torch.arange(7) + 0.5) * side / 14
            torch.testing.assert_close(out[0, 0, 3], centres, atol=1e-3, rtol=0)


def test_pooling_equals_the_detectors_if_the_levels_agree():
    torch.manual_seed(0)
    pooler = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.roi_heads)
    pooler = pooler.box_pooler
    features = [torch.randn(2, 4, s, s) for s in (32, 16, 8, 4)]
    sides = torch.tensor([20.0, 40.0, 80.0, 100.0])  # canonical rule at 64: P2, P3, P4, P4
    boxes = torch.stack([torch.zeros(4), torch.zeros(4), sides, sides], dim=1).expand(2, 4, 4)
    stock = pooler(features, [Boxes(b) for b in boxes])
    levels = torch.tensor([[0, 1, 2, 2]]).expand(2, 4)
    torch.testing.assert_close(pool_regions(features, boxes, levels, pooler, (128, 128)), stock)


def slow_soco(model, batch):
    """One region at a time, no batching of levels; batch norm in eval mode."""
    size = {i: v.images.shape[-1] for i, v in enumerate(batch.views)}

    def embed(network, v, b, k, predictor):
        view = batch.views[v]
        image = (view.images[b : b + 1].float() - model.preprocess.pixel_mean) / (
            model.preprocess.pixel_std
        )
        maps = network["backbone"](image)
        box = view.boxes[b, k]
        side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt().item()
        level = next(i for i, bound in enumerate(model.level_scales) if side <= bound)
        feature = maps[f"p{level + 2}"]
        scale = feature.shape[-1] / size[v]
        roi = roi_align(feature, [box[None]], 7, scale, sampling_ratio=2, aligned=True)
        x = network["projector"](network["head"](roi))
        return F.normalize(predictor(x) if predictor else x, dim=1)[0]

    slots = batch.views[1].boxes.shape[1]
    losses = {}
    for j, group in enumerate(model.groups, start=1):
        value = 0.0
        for a, b in (((0, group * slots), (j, 0)), ((j, 0), (0, group * slots))):
            images = []
            for i in range(len(batch)):
                cosines = []
                for s in range(slots):
                    for t in range(slots):
                        ids_a = batch.views[a[0]].region_ids[i, a[1] + s]
                        ids_b = batch.views[b[0]].region_ids[i, b[1] + t]
                        if ids_a == ids_b:
                            p = embed(model.online, a[0], i, a[1] + s, model.predictor)
                            z = embed(model.target, b[0], i, b[1] + t, None)
                            cosines.append(p @ z)
                images.append(sum(cosines) / (len(cosines) + 1e-6))
            value = value - 2 * sum(images) / len(images)
        losses[f"loss_view{j + 1}"] = value
    return losses


@pytest.mark.parametrize("all_levels", [False, True])
@pytest.mark.parametrize(
    ("sources", "sizes", "slots"),
    [
        (("crop", "crop"), (96, 96, 64), (8, 4, 4)),
        (("crop", 0), (96, 96, 64), (4, 4, 4)),  # the third view is the second, smaller
        (("crop", "crop", 0), (96, 96, 64, 32), (8, 4, 4, 4)),  # star
    ],
)
def test_losses_against_a_slow_restatement(
    small_soco, make_batch, all_levels, sources, sizes, slots
):
    model = small_soco(
        sources, level_scales=(24, 48, 90, 96), all_levels=all_levels, zero_init=False
    ).eval()
    batch = make_batch(2, sizes, slots, seed=1)
    with torch.no_grad():
        for parameter in model.target.parameters():
            parameter.mul_(1.05)
        fast, slow = model(batch), slow_soco(model, batch)
    for name, value in slow.items():
        assert fast[name].item() == pytest.approx(value.item(), abs=1e-4)


def test_head_on_all_levels_changes_only_batch_statistics(small_soco, make_batch):
    batch = make_batch(4, (64, 64, 32), seed=2)
    scales = dict(level_scales=(16, 32, 60, 64))
    few, all_ = small_soco(**scales), small_soco(all_levels=True, **scales)
    few.train(), all_.train()
    assert total(few(batch)).item() != pytest.approx(total(all_(batch)).item(), abs=1e-4)
    torch.testing.assert_close(  # the trunk has seen the same
        few.backbone.bottom_up.stem.conv1.norm.running_mean,
        all_.backbone.bottom_up.stem.conv1.norm.running_mean,
    )
    few.eval(), all_.load_state_dict(few.state_dict()), all_.eval()
    assert total(few(batch)).item() == pytest.approx(total(all_(batch)).item(), abs=1e-5)


def test_every_parameter_learns_and_the_target_does_not(small_soco, make_batch):
    model = small_soco(level_scales=(16, 32, 60, 64), zero_init=False).train()
    # All regions of one level: the other levels' parameters must still be in the graph.
    batch = make_batch(2, (64, 64, 32))
    for view in batch.views:
        view.boxes[...] = torch.tensor([1.0, 1.0, 12.0, 12.0])
    total(model(batch)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad is not None, name


def test_target_starts_as_a_copy_and_follows_the_schedule(small_soco):
    model = small_soco()
    before = {k: v.clone() for k, v in model.target.named_parameters()}
    online = dict(model.online["projector"].named_parameters())
    for name, parameter in online.items():
        torch.testing.assert_close(before[f"projector.{name}"], parameter, rtol=0, atol=0)
    running = model.target["projector"][1].norm.running_mean.clone()
    with torch.no_grad():
        for parameter in online.values():
            parameter.add_(1.0)
        model.projector[1].norm.running_mean.fill_(9.0)
    with EventStorage():
        model.before_step(250, 1000)
    momentum = 0.991464  # 1 - 0.01 * (1 + cos(pi / 4)) / 2
    for name, parameter in online.items():
        old = before[f"projector.{name}"]
        expected = momentum * old + (1 - momentum) * parameter
        torch.testing.assert_close(
            model.target["projector"].get_parameter(name), expected, rtol=0, atol=1e-6
        )
    torch.testing.assert_close(model.target["projector"][1].norm.running_mean, running)


def test_regions_above_the_last_scale_are_reported(small_soco, make_batch, caplog):
    """They are left out, as in the released code, which has no such views."""
    batch = make_batch(2, (64, 64, 32))
    with EventStorage():
        small_soco(level_scales=(16, 32, 60, 64)).train()(batch)
        assert "are left out" not in caplog.text
        small_soco(level_scales=(4, 8, 10, 12)).train()(batch)
    assert "regions above 12 pixels are left out: model.level_scales=[4, 8, 10, 12]" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"level_scales": (48, 96)}, r"model.level_scales=\[48, 96\] must give one scale"),
        ({"level_scales": (64, 60, 32, 16)}, r"model.level_scales=\[64, 60, 32, 16\] must ascend"),
        (
            {"in_features": ["p3", "p4", "p5", "p6"]},
            r"model.in_features=.*: the backbone has no p6, but p2, p3, p4, p5",
        ),
        ({"in_features": ["p2", "p3", "p4", "p9"]}, "the backbone has no p9, but p2"),
        (
            {"in_features": ["p3", "p4", "p5"], "level_scales": (32, 60, 64)},
            "model.in_features=.* must name 4 maps, one for each of model.pooler.scales",
        ),
    ],
)
def test_levels_that_do_not_fit_are_reported(small_soco, arguments, message):
    with pytest.raises(UserError, match=message):
        small_soco(**arguments)


def test_zero_init_zeroes_the_last_norm_of_each_block(small_soco):
    blocks = [b for s in ("res2", "res5") for b in getattr(small_soco().backbone.bottom_up, s)]
    assert all(block.conv2.norm.weight.abs().max() == 0 for block in blocks)
    assert all(block.conv1.norm.weight.min() == 1 for block in blocks)


def test_bgr_detectors_see_bgr(small_soco, make_batch):
    batch = make_batch(1)
    mean, std = [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]
    model = small_soco(input_format="BGR", pixel_mean=mean, pixel_std=std)
    seen = model.preprocess(batch.views[0])
    rgb = batch.views[0].images.float()
    for channel in range(3):
        expected = (rgb[:, 2 - channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(seen[:, channel], expected, atol=1e-4, rtol=1e-5)


def test_c4_recipe_trains_and_transfers_res5(make_batch):
    recipe = CONFIG_ROOT.parent / "projects/SoCo/configs/soco_r50-c4_16xb128-100ep_imagenet.py"
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(recipe)).model).train()
    for i in range(3):
        assert model.roi_heads.res5[i].conv3.norm.weight.abs().max() == 0
    loss = model(make_batch(2, (64, 64), (4, 4)))["loss_view2"]
    loss.backward()
    assert -4 <= loss.item() <= 4
    for name, parameter in model.named_parameters():
        assert name.startswith("target.") or parameter.grad is not None, name
    names = set(model.state_dict())
    assert "roi_heads.res5.0.conv1.weight" in names and "target.head.2.conv3.weight" in names
    assert model.projector[0].in_features == 2048
    assert model.groups == [0]


def test_compiled_trunks_give_the_same_loss_and_gradients(small_soco, make_batch, monkeypatch):
    batch = make_batch(2, (64, 64, 32))
    model, compiled = small_soco(), small_soco()
    names = list(model.state_dict())
    # torch.compile without code generation, which would take a minute.
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(torch._dynamo.config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    compile_trunks(compiled)
    done = [name for name, m in compiled.named_modules() if m._compiled_call_impl is not None]
    assert done == ["backbone.bottom_up", "target.backbone.bottom_up"]
    for _ in range(2):
        expected, found = total(model(batch)), total(compiled(batch))
        assert found.item() == pytest.approx(expected.item(), abs=1e-5)
        expected.backward()
        found.backward()
    frames = torch._dynamo.utils.counters["frames"]
    assert frames["ok"] == frames["total"] > 0
    assert list(compiled.state_dict()) == names
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-5, msg=name)
