"""The meta-architecture: losses, gradients and state."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage
from torch import nn
from torchvision.ops import box_iou, roi_align

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.errors import UserError
from region_pretrain.modeling.norms import GhostBatchNorm
from region_pretrain.modeling.regions import assign_levels
from region_pretrain.projects.ccop.candidates import draw_noise, jitter_boxes

LOSSES = ("loss_image", "loss_inter", "loss_intra")


def total(outputs):
    return sum(outputs[name] for name in LOSSES)


def step(model, batch, iteration=0, max_iter=10):
    with EventStorage():
        model.before_step(iteration, max_iter)
    return model(batch)


def slow_ccop(model, batch):
    """One region and one candidate at a time; batch norm and dropout in eval mode."""
    query_view, key_view = batch.views
    size = query_view.images.shape[-1]
    difficulty = model.curriculum.difficulty

    def maps_of(network, view, i):
        images = (view.images[i : i + 1].float() - model.preprocess.pixel_mean) / (
            model.preprocess.pixel_std
        )
        maps = network["backbone"](images)
        last = network["backbone"].bottom_up(images)["res5"].mean(dim=(2, 3))
        return maps, F.normalize(network["image_head"](last), dim=1)[0]

    def embed(network, maps, box):
        side = ((box[2] - box[0]) * (box[3] - box[1])).sqrt().item()
        bounds = [*model.level_scales[:-1], float("inf")]
        level = next(k for k, bound in enumerate(bounds) if side <= bound)
        feature = maps[f"p{level + 2}"]
        roi = roi_align(feature, [box[None]], 7, feature.shape[-1] / size, 2, True)
        return F.normalize(network["region_head"](roi.flatten(1)), dim=1)[0]

    def nce(query, key, queue):
        logits = torch.cat([(query @ key)[None], queue.keys @ query]) / model.temperature
        return F.cross_entropy(logits[None], torch.tensor([0])).item()

    image, inter, intra, chosen = [], [], [], []
    for i in range(len(batch)):
        query_maps, query_image = maps_of(model.query, query_view, i)
        key_maps, key_image = maps_of(model.key, key_view, i)
        image.append(nce(query_image, key_image, model.image_queue))
        noise = draw_noise(model.seed, model.curriculum.iteration, [batch.indices[i]], (6, 10, 4))
        queries, keys, boxes = [], [], []
        for k in range(6):
            if not key_view.valid[i, k]:
                continue
            box = key_view.boxes[i, k]
            queries.append(embed(model.query, query_maps, query_view.boxes[i, k]))
            keys.append(embed(model.key, key_maps, box))
            boxes.append(box)
            jittered = jitter_boxes(box, noise[0, k], difficulty).clamp(0, size)
            options = [keys[-1]]
            for other in jittered:
                if box_iou(other[None], box[None]).item() >= difficulty.iou_floor:
                    options.append(embed(model.key, key_maps, other))
            hardest = min(options, key=lambda option: float(option @ queries[-1]))
            chosen.append(float(hardest @ queries[-1]))
            inter.append(nce(queries[-1], hardest, model.region_queue))
        for a in range(len(queries)):
            for b in range(len(queries)):
                if a != b and box_iou(boxes[a][None], boxes[b][None]).item() < 0.05:
                    own = queries[b] @ keys[b]
                    intra.append(max(0.0, float(queries[a] @ keys[b] - own) + 0.4))
    return {
        "loss_image": np.mean(image),
        "loss_inter": np.mean(inter),
        "loss_intra": np.mean(intra),
        "curriculum/chosen_similarity": np.mean(chosen),
    }


@pytest.mark.parametrize("level", [0.1, 1.0])
def test_losses_against_a_slow_restatement(small_ccop, make_batch, level):
    model = small_ccop().eval()
    with torch.no_grad():  # make the networks differ, to show which one saw what
        for parameter in model.key.parameters():
            parameter.mul_(1.02)
    batch = make_batch((3, 5, 0, 2), seed=3)
    model.curriculum.level, model.curriculum.iteration = level, 4
    with torch.no_grad():
        fast, slow = model(batch), slow_ccop(model, batch)
    for name, value in slow.items():
        assert fast[name].item() == pytest.approx(value, abs=2e-4), name
    assert slow["loss_intra"] > 0


def test_weights_switch_losses(small_ccop, make_batch):
    batch = make_batch()
    plain = small_ccop().eval()(batch)
    scaled = small_ccop(image_weight=0.0, inter_weight=2.0, intra_weight=0.5).eval()(batch)
    for name, weight in zip(LOSSES, (0.0, 2.0, 0.5), strict=True):
        assert scaled[name].item() == pytest.approx(weight * plain[name].item(), rel=1e-5)


def test_the_hardest_candidate_is_harder_than_any(small_ccop, make_batch):
    batch = make_batch()
    similarity = {}
    for hardest in (True, False):
        model = small_ccop(hardest=hardest).eval()
        model.curriculum.level = 1.0
        with torch.no_grad():
            similarity[hardest] = model(batch)["curriculum/chosen_similarity"].item()
    assert similarity[True] < similarity[False]


def test_dropout_makes_two_keys_of_one_region(small_ccop, make_batch):
    """The positive and the key of the margin loss are two draws."""
    batch = make_batch((1, 1, 1, 1))
    for dropout, same in ((0.5, False), (0.0, True)):
        model = small_ccop(dropout=dropout, num_candidates=0).train()
        candidates = model._candidates(batch.views[1], batch.indices, model.curriculum.at(0))
        keys = model._keys(batch.views[1], candidates)
        assert torch.equal(keys.candidates, keys.regions) is same


@pytest.mark.parametrize("counts", [(0, 0, 0, 0), (1, 0, 0, 0), (0, 6, 0, 1)])
def test_images_without_regions_train(small_ccop, make_batch, counts):
    model = small_ccop().train()
    outputs = step(model, make_batch(counts))
    assert all(value.isfinite() for value in outputs.values())
    total(outputs).backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    if not any(counts):
        assert outputs["loss_inter"] == outputs["loss_intra"] == 0
    assert model.region_queue.pointer == sum(counts) and model.image_queue.pointer == 4


def test_query_networks_learn_and_key_networks_do_not(small_ccop, make_batch):
    model = small_ccop().train()
    batch = make_batch()
    for slot, side in enumerate((12.0, 25.0, 50.0, 61.0)):  # one region on each level
        batch.views[0].boxes[1, slot] = torch.tensor([1.0, 1.0, 1.0 + side, 1.0 + side])
    total(step(model, batch)).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("key."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_key_network_moves_before_the_forward_and_keeps_its_own_statistics(small_ccop):
    model = small_ccop()
    with torch.no_grad():
        for parameter in model.query["image_head"].parameters():
            parameter.zero_()
        for parameter in model.key["image_head"].parameters():
            parameter.fill_(1.0)
    norm = model.backbone.bottom_up.stem.conv1.norm
    norm.running_mean.fill_(9.0)
    model.momentum = lambda where: 0.999
    for expected in (0.999, 0.998001):
        with EventStorage():
            model.before_step(0, 10)
        for parameter in model.key["image_head"].parameters():
            torch.testing.assert_close(parameter, torch.full_like(parameter, expected))
    key_norm = model.key["backbone"].bottom_up.stem.conv1.norm
    assert key_norm.running_mean.abs().max() == 0
    assert key_norm.weight is not norm.weight


def test_the_keys_of_a_step_are_enqueued(small_ccop, make_batch):
    model = small_ccop().train()
    start = model.region_queue.keys.clone()
    step(model, make_batch((3, 5, 1, 2)))
    assert model.region_queue.pointer == 11
    assert torch.equal(model.region_queue.keys[11:], start[11:])
    new = model.region_queue.keys[:11]
    torch.testing.assert_close(new.norm(dim=1), torch.ones(11))
    assert not torch.equal(new, start[:11])
    model.eval()(make_batch())
    assert model.region_queue.pointer == 11  # only training fills it


def test_the_curriculum_is_logged(small_ccop, make_batch):
    model = small_ccop()
    with EventStorage() as storage:
        model.before_step(4, 10)
        latest = {name: value for name, (value, _) in storage.latest().items()}
    assert latest == pytest.approx(
        {
            "curriculum/level": 0.5,
            "curriculum/center_range": 0.375,
            "curriculum/log_size_range": 0.875,
            "curriculum/iou_floor": 0.6,
        }
    )
    outputs = model(make_batch())
    assert 0.1 < outputs["curriculum/valid_fraction"] < 0.9
    assert 0.6 <= outputs["curriculum/chosen_iou"] <= 1
    assert -1 <= outputs["curriculum/chosen_similarity"] <= 1


def test_norms_are_over_groups_only_if_shuffling_is_enabled(small_ccop):
    shuffled, synced = small_ccop(shuffle=True), small_ccop(shuffle=False)
    for model, kind in ((shuffled, GhostBatchNorm), (synced, nn.SyncBatchNorm)):
        norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms and all(type(m) is kind for m in norms)
    assert shuffled.state_dict().keys() == synced.state_dict().keys()


@pytest.mark.parametrize(
    ("side", "level"), [(48, 0), (48.1, 1), (96, 1), (97, 2), (192, 2), (193, 3), (224, 3)]
)
def test_levels(side, level):
    assert assign_levels(torch.tensor([0.0, 0, side, side]), (48, 96, 192, 224)) == level


def test_names_and_sizes_of_the_full_model():
    recipe = CONFIG_ROOT.parent / "projects/CCOP/configs/ccop_r50-fpn_8xb32-800ep_coco.py"
    detector = get_config("detection/mask_rcnn_r50_fpn_infomin.py").model
    with torch.device("meta"):
        ccop = instantiate(LazyConfig.load(str(recipe)).model)
        stock = instantiate(detector)
    theirs = {k: v.shape for k, v in stock.state_dict().items()}
    mine = {k: v.shape for k, v in ccop.state_dict().items() if k.startswith("backbone.")}
    assert mine == {k: v for k, v in theirs.items() if k.startswith("backbone.")}
    assert "backbone.fpn_lateral2.norm.running_mean" in mine

    def count(module):
        return sum(p.numel() for p in module.parameters())

    assert count(ccop.image_head) == 4_458_624 and count(ccop.region_head) == 25_954_432
    for queue in (ccop.image_queue, ccop.region_queue):
        assert queue.keys.shape == (65_536, 128)
    # Linear, dropout, ReLU, linear.
    kinds = [type(m) for m in ccop.region_head]
    assert kinds == [nn.Linear, nn.Dropout, nn.ReLU, nn.Linear]
    assert ccop.region_head[1].p == 0.1
    assert not any("region_head" in k or "queue" in k for k in mine)


@pytest.mark.parametrize(
    "wrong",
    [
        {"anchor": "diagonal"},
        {"temperature": 0.0},
        {"level_scales": (48, 96)},
        {"intra_weight": -1.0},
    ],
)
def test_errors_name_the_wrong_value(small_ccop, wrong):
    with pytest.raises(UserError, match=f"model.{next(iter(wrong))}"):
        small_ccop(**wrong)


def test_the_trunk_has_the_map_of_the_image(small_ccop):
    with pytest.raises(UserError, match="model.trunk_feature=p5 must be one of res2, res3, res4"):
        small_ccop(trunk_feature="p5")
