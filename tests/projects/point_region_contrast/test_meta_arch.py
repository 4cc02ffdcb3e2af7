"""The meta-architecture: losses, momentum network, levels and memory."""

import math
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.utils.events import EventStorage

from region_pretrain.config import CONFIG_ROOT
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY
from region_pretrain.errors import UserError
from region_pretrain.modeling.losses import info_nce
from region_pretrain.overrides import apply_overrides
from region_pretrain.projects.point_region_contrast import PointContrast
from region_pretrain.projects.point_region_contrast import contrast as contrast_module
from region_pretrain.projects.point_region_contrast.recompute import entries_at_once

PROJECTS = CONFIG_ROOT.parent / "projects"
LOSSES = ("loss_image", "loss_point", "loss_affinity")


@pytest.mark.parametrize(("queue", "loss"), [(65_536, 6.0926), (8, 0.0525)])
def test_values_of_the_image_loss(queue, loss):
    """An image's positive is its own key, at any position in the batch."""
    keys = torch.eye(5)[:4]
    negatives = torch.eye(5)[4:].expand(queue, -1)
    torch.testing.assert_close(
        info_nce(keys, keys, negatives, 0.2), torch.full((4,), loss), rtol=0, atol=1e-4
    )


def test_losses_against_their_parts(small_model, make_batch):
    model, batch = small_model().eval(), make_batch()
    with torch.no_grad():
        for parameter in model.key.parameters():
            parameter.mul_(1.05)
        outputs = model(batch)
        query_view, key_view, _ = batch.views
        maps = []
        for network, view in zip((model.query, model.key), batch.views[:2], strict=True):
            last = network["backbone"].bottom_up(model.preprocess(view))["res5"]  # (4, C, 2, 2)
            rows = network["head"](last.permute(0, 2, 3, 1).reshape(-1, 192))
            maps.append(rows.view(4, 2, 2, -1).permute(0, 3, 1, 2))
        query, key = (F.normalize(m.mean(dim=(2, 3)), dim=1) for m in maps)
        image = info_nce(query, key, model.queue.keys, 0.2).mean()
        assert float(outputs["loss_image"]) == pytest.approx(0.7 * float(image), rel=1e-5)

        vectors = []
        for view, feature in zip((query_view, key_view), maps, strict=True):
            xy = view.boxes[:, :24, :2] / 32 - 1  # to [-1, 1] of the view
            sampled = F.grid_sample(
                feature, xy[:, :, None], align_corners=False, padding_mode="border"
            )
            vectors.append(F.normalize(sampled[..., 0].transpose(1, 2), dim=2))
        expected, count = 0.0, 0
        flat, valid = vectors[1].flatten(0, 1), key_view.valid.flatten()
        for b in range(4):
            for s in range(24):
                if not query_view.valid[b, s]:
                    continue
                logits = flat @ vectors[0][b, s] / 0.2
                same = key_view.region_ids[b] == query_view.region_ids[b, s]
                mine = logits.view(4, 24)[b][same & key_view.valid[b]]
                expected += float(logits[valid].logsumexp(0) - mine.mean())
                count += 1
    assert count > 40
    assert float(outputs["loss_point"]) == pytest.approx(0.3 * expected / count, rel=1e-4)
    assert float(outputs["points/per_image"]) == count / 4
    assert model.queue.pointer == 0  # only training fills it


def test_weights_of_the_sum(small_model, make_batch):
    batch = make_batch()
    weighted = small_model().eval()(batch)
    single = small_model(image_weight=1.0, point_weight=1.0, affinity_weight=1.0).eval()(batch)
    ratios = [(weighted[name] / single[name]).item() for name in LOSSES]
    assert ratios == pytest.approx([0.7, 0.3, 0.3]) and sum(ratios) == pytest.approx(1.3)


def test_the_key_network_moves_between_partner_and_key_view(small_model, make_batch, monkeypatch):
    model, batch = small_model(momentum=lambda done: 0.999).train(), make_batch()
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.zero_()
        for parameter in model.key["head"].parameters():
            parameter.fill_(1.0)
    seen = []
    describe = model._embed

    def watch(network, view, *rest):
        if network is model.key:
            seen.append((view is batch.views[2], float(model.key["head"][0].weight[0, 0])))
        return describe(network, view, *rest)

    monkeypatch.setattr(model, "_embed", watch)
    with EventStorage():
        model.before_step(0, 10)
    model(batch)
    assert seen[0] == (True, 1.0) and seen[1] == (False, pytest.approx(0.999))
    model(batch)  # a second micro-batch of the step
    assert seen[2:] == seen[:2]
    assert all(p.grad is None for p in model.key.parameters())


@pytest.mark.parametrize("fpn", ["", "p3"])
def test_every_trainable_parameter_receives_a_gradient(small_model, make_batch, fpn):
    model = small_model(fpn=fpn, prototypes=4).train()
    outputs = model(make_batch())
    sum(outputs[name] for name in LOSSES).backward()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in model.named_parameters() if p.grad is not None}
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    if fpn:
        frozen = {
            n.split(".")[1] for n, p in model.backbone.named_parameters("b") if not p.requires_grad
        }
        assert frozen == {"fpn_lateral2", "fpn_output2", "fpn_output4", "fpn_output5"}
        assert "backbone.fpn_output3.weight" in trained
    model.after_step(0, 10)
    assert model.distillation.center.abs().sum() > 0 and model.queue.pointer == 4


def test_losses_that_are_switched_off_leave_nothing_behind(small_model, make_batch):
    model = small_model(affinity_weight=0.0, point_weight=0.0).train()
    outputs = model(make_batch(pairs=0))
    assert [name for name in outputs if name.startswith("loss")] == ["loss_image"]
    outputs["loss_image"].backward()
    assert all(p.grad is not None for m in model.query.values() for p in m.parameters())
    with pytest.raises(UserError, match="views.pairs=0 leaves nothing to distil"):
        small_model()(make_batch(pairs=0))
    for wrong, named in (
        ({"temperature": 0.0}, "model.temperature=0.0 must be positive"),
        ({"point_weight": -1.0}, "model.point_weight=-1.0 must be at least 0"),
        (
            {"image_weight": 0.0, "point_weight": 0.0},
            "one of model.image_weight and model.point_weight must be positive",
        ),
        ({"fpn": "p9"}, "model.feature=p9 must be one of p2"),
    ):
        with pytest.raises(UserError, match=named):
            small_model(**wrong)


def test_batches_without_common_regions_or_places(small_model, make_batch):
    batch = make_batch()
    for view in batch.views:
        view.valid.zero_()
    model = small_model().train()
    outputs = model(batch)
    assert outputs["loss_point"] == 0 and outputs["loss_affinity"] == 0
    sum(outputs[name] for name in LOSSES).backward()
    assert all(p.grad.isfinite().all() for m in model.query.values() for p in m.parameters())


# The README's four levels, on the Shapes recipe.
VIEWS = "dataloader.train.dataset.views"
LEVELS = {
    "image": [f"+{VIEWS}.maps.n=1", "model.contrast.pool=4"],
    "region": ["model.contrast.pool=4"],
    "point": [f"{VIEWS}.positives=location"],
    "point-region": [],
}


@pytest.mark.parametrize("level", LEVELS)
def test_the_four_levels_are_settings_of_one_loss(level, noise_folder):
    recipe = LazyConfig.load(
        str(PROJECTS / "PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py")
    )
    names = f"dataloader.train.dataset.names=folder://{noise_folder}"
    cfg = apply_overrides(recipe, [names, *LEVELS[level]])
    views = instantiate(cfg.dataloader.train.dataset).batch(0, 0, range(4)).views[:2]
    contrast = instantiate(cfg.model.contrast)
    seen = []
    contrast._loss = lambda images, query, bank, positive, candidate, *rest: (
        seen.append((positive, candidate)) or query.sum()
    )
    rng = np.random.default_rng(0)
    points = [
        contrast_module.Points(
            torch.from_numpy(rng.normal(size=(4, 64, 8)).astype(np.float32)),
            v.region_ids[:, :64],
            v.valid[:, :64],
        )
        for v in views
    ]
    _, count, _ = contrast(*points)
    ((positive, candidate),) = seen
    regions = int(views[0].valid[:, :64].sum()) // 4
    per_anchor = positive.sum(dim=2)[positive.any(dim=2)]
    assert count == len(per_anchor) == (regions if "pool" in str(LEVELS[level]) else 4 * regions)
    if level == "point":  # one positive, unless a place was drawn twice
        at = views[0].boxes[:, :64, :2]
        same = (at[:, :, None] == at[:, None]).all(dim=3) & views[0].valid[:, None, :64]
        assert (positive == (same & views[0].valid[:, :64, None])).all() and 1 in per_anchor
    else:
        assert set(per_anchor.tolist()) == {4 if level == "point-region" else 1}
    if level == "image":  # no negatives within the image
        assert (candidate == positive).all() and count == 4
    else:
        assert (candidate.sum() > positive.sum()).item()


@pytest.mark.parametrize("level", ["point-region", "region"])
def test_training_on_shuffled_regions_does_not_diverge(small_model, make_batch, level):
    """With unrelated positives the loss stays near that of identical embeddings."""
    contrast = PointContrast(pool=3 if level == "region" else 1)
    model = small_model(contrast=contrast).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    rng, losses = np.random.default_rng(0), []
    for step in range(10):
        batch = make_batch()
        ids = batch.views[0].region_ids
        for b in range(len(batch)):  # each region's points get another region's id
            regions = ids[b, :24].view(8, 3)
            order = torch.from_numpy(rng.permutation(8))
            ids[b, :24] = regions[order].flatten()
            batch.views[0].valid[b, :24] = batch.views[0].valid[b, :24].view(8, 3)[order].flatten()
        with EventStorage():
            model.before_step(step, 10)
        outputs = model(batch)
        total = sum(outputs[name] for name in LOSSES)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(outputs["loss_point"].item() / 0.3)
        assert all(p.isfinite().all() for p in parameters)
    even = math.log(4 * (8 if level == "region" else 24))  # the maximum number of candidates
    assert max(losses) < 1.5 * even and losses[-1] < 1.2 * even


def _saved_bytes(model: torch.nn.Module, batch: ViewBatch) -> int:
    """Bytes that a forward pass on the meta device keeps for the backward pass."""
    own = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor):
        storage = tensor.untyped_storage()
        if tensor.is_meta and storage._cdata not in own:
            kept.append(tensor)  # or another storage could get the same address
            sizes[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        outputs = model.train()(batch)
    assert all(v.is_meta for n, v in outputs.items() if n.startswith("loss"))
    return sum(sizes.values())


def test_memory_beyond_moco_at_32_images_of_224_pixels(monkeypatch):
    """Computed from shapes, without allocating anything."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # no such device
    ours = LazyConfig.load(
        str(PROJECTS / "PointRegionContrast/configs/point-region_r50_8xb32-100ep_imagenet.py")
    )
    moco = LazyConfig.load(str(PROJECTS / "MoCo/configs/moco-v2_r50_8xb32-200ep_imagenet.py"))
    none = np.zeros((0, 4), np.float32)
    samples = instantiate(ours.dataloader.train.dataset.views)(
        500, 375, none, np.random.default_rng(0)
    )
    views = [
        View(
            images=torch.zeros(32, 3, 224, 224, dtype=torch.uint8),
            boxes=torch.from_numpy(np.stack([s.boxes] * 32)),
            valid=torch.from_numpy(np.stack([s.valid] * 32)),
            region_ids=torch.from_numpy(np.stack([s.region_ids] * 32)),
            affine=torch.zeros(32, 2, 3),
            photometry=torch.from_numpy(np.tile(IDENTITY, (32, 1))),
        )
        for s in samples
    ]
    assert views[0].valid.float().mean() > 0.5
    batch = ViewBatch(views, torch.arange(32))
    with torch.device("meta"):
        models = [instantiate(cfg.model) for cfg in (ours, moco)]
    saved = [
        _saved_bytes(model, b)
        for model, b in zip(models, (batch, replace(batch, views=views[:2])), strict=True)
    ]
    # Weight, gradient, SGD buffer and momentum copy of what is trained in addition to MoCo's.
    trained = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in models]
    weights = 4 * 4 * (trained[0] - trained[1])
    # Temporary logits, masks and softmax of a slice of either loss; and the third view.
    parts = 8 * 4 * entries_at_once(torch.device("cpu"))
    view = 2 * 4 * 32 * 3 * 224 * 224
    beyond = saved[0] - saved[1] + weights + parts + view
    gib = [round(x / 2**30, 3) for x in (saved[1], saved[0], weights, parts, view, beyond)]
    print("GiB kept by MoCo v2, by this; weights, parts, view; beyond MoCo v2:", gib)
    assert 2e9 < saved[1] < 4e9 and beyond < 1e9
