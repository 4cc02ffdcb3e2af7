"""MCL's meta-architecture: losses, gradients, and the modules shared with the detector."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import LazyConfig, instantiate
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from region_pretrain.config import CONFIG_ROOT, get_config
from region_pretrain.data.batch import ViewBatch
from region_pretrain.engine.checkpoint import split_state
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.errors import UserError
from region_pretrain.modeling.heads import MLPHead
from region_pretrain.modeling.meta_arch import renew_momentum_copies
from region_pretrain.modeling.trunk import Trunk
from region_pretrain.projects.mcl import MCL, PseudoLevels, mcl
from region_pretrain.projects.mcl.montage import cut_windows

RECIPES = CONFIG_ROOT.parent / "projects/MCL/configs"
NAMES = ["p5", "p4", "p3", "p2"]


def total(outputs):
    return sum(v for k, v in outputs.items() if k.startswith("loss"))


def count(module):
    return sum(p.numel() for p in module.parameters())


def full_size(name, **overrides):
    cfg = LazyConfig.load(str(RECIPES / f"{name}.py"))
    cfg.model.update(overrides)
    with torch.device("meta"):
        return instantiate(cfg.model)


def test_names_and_sizes_of_the_full_size_model_are_the_detectors():
    model = full_size("mcl_r50-fpn_32xb128-100ep_imagenet")
    with torch.device("meta"):
        stock = instantiate(get_config("detection/mask_rcnn_r50_fpn_4conv1fc.py").model)
    mine = {k: v.shape for k, v in model.state_dict().items()}
    theirs = {k: v.shape for k, v in stock.state_dict().items()}
    shared = {k for k in mine if k.startswith(("backbone.", "roi_heads."))}
    assert all(mine[k] == theirs[k] for k in shared)
    wanted = {k for k in theirs if k.startswith(("backbone.", "roi_heads.box_head.conv"))}
    assert shared == wanted  # no fc layer: the recipe averages
    for name in (
        "backbone.fpn_output5.norm.running_var",
        "roi_heads.box_head.conv1.weight",
        "roi_heads.box_head.conv4.norm.running_mean",
        "backbone.bottom_up.stem.conv1.norm.bias",
    ):
        assert name in shared
    assert "roi_heads.box_head.fc1.weight" not in mine
    assert count(model.backbone.bottom_up) == 23_508_032
    assert count(model.backbone) - count(model.backbone.bottom_up) == 3_346_432
    assert count(model.roi_heads) + count(model.projector) == 3_416_320
    assert [count(p) for p in model.predictors] == [1_054_976] * 4
    assert model.projector[-1].norm.weight is None  # batch norm without affine
    assert model.names == NAMES and model.window == 7


def test_initialisation_of_the_predictors():
    torch.manual_seed(0)
    model = instantiate(LazyConfig.load(str(RECIPES / "mcl_r18-fpn_b32_shapes.py")).model)
    firsts = [p[0].weight for p in model.predictors]
    assert all(w.std().item() == pytest.approx(0.01, rel=0.02) for w in firsts)
    assert not torch.equal(firsts[0], firsts[1])
    assert all(p[-1].bias.abs().max() == 0 for p in model.predictors)


def test_with_fc_the_complete_head_is_trained(small_mcl, make_batch):
    model = small_mcl(fc=True).train()
    total(model(make_batch(4))).backward()
    names = {n for n, p in model.roi_heads.named_parameters() if p.grad.abs().sum() > 0}
    assert {"box_head.conv1.weight", "box_head.fc1.weight", "box_head.fc1.bias"} <= names
    with pytest.raises(UserError, match="input_dim=48: must be 256"):
        small_mcl(fc=True, projector=MLPHead(48, 32, 16))


def slow_mcl(model, batch, slots):
    """One tile at a time, by loops and slices; batch norm in eval mode."""
    levels, size, n_images = len(model.names), model.montage.size, len(batch)

    def vector(network, p, i, slot):
        n, side = model.montage.ratios[i], size // model.montage.ratios[i]
        canvas = torch.zeros(1, 3, size, size)
        for t in range(n * n):  # every tile of this slot's canvas
            image = slots[p][i][slot // (n * n) * n * n + t]
            pixels = batch.views[p * levels + i].images[image].float()
            pixels = (pixels - model.preprocess.pixel_mean) / model.preprocess.pixel_std
            row, column = divmod(t, n)
            at = (0, slice(None), slice(row * side, row * side + side))
            canvas[(*at, slice(column * side, column * side + side))] = pixels[:, ::n, ::n]
        feature = network["backbone"](canvas)[model.names[i]]
        row, column = divmod(slot % (n * n), n)
        window = feature[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        return network["projector"](network["head"](window).mean(dim=(2, 3)))[0]

    def key(p, j, image):
        own = [s for s, x in enumerate(slots[p][j].tolist()) if x == image]
        units = [F.normalize(vector(model.target, p, j, s), dim=0) for s in own]
        return F.normalize(sum(units) / len(units), dim=0)

    losses = {}
    for i, name in enumerate(model.names):
        losses[f"loss_{name}"] = 0.0
        for p in range(2):
            for j in model.pairs[i]:
                keys = torch.stack([key(1 - p, j, image) for image in range(n_images)])
                terms = []
                for slot, image in enumerate(slots[p][i].tolist()):
                    v = vector(model.online, p, i, slot)[None]
                    u = F.normalize(model.predictors[i](v), dim=1)[0]
                    logits = keys @ u / model.temperature
                    terms.append(torch.logsumexp(logits, 0) - logits[image])
                loss = 2 * model.temperature * sum(terms) / len(terms)
                losses[f"loss_{name}"] += model.level_weights[i] * loss / len(model.pairs[i])
    return losses


@pytest.mark.parametrize(
    ("compute", "pairing"),
    [("all", "top"), ("windows", "top"), ("maps", "top"), ("maps", [[0, 2], [1], [2]])],
)
def test_losses_against_a_slow_restatement(
    small_mcl, small_montage, make_batch, monkeypatch, compute, pairing
):
    montage = small_montage(ratios=[1, 2, 4], images_per_canvas=[1, 4, 16])
    model = small_mcl(
        montage=montage,
        level_weights=[0.5, 0.3, 0.2],
        temperature=0.3,
        compute=compute,
        pairing=pairing,
    ).eval()
    with torch.no_grad():  # target and online differ, and norms are not the identity
        for module in model.modules():
            if isinstance(module, torch.nn.SyncBatchNorm):
                module.running_mean.normal_(std=0.1)
        for parameter in model.target.parameters():
            parameter.mul_(1 + 0.2 * torch.randn_like(parameter))
    batch = make_batch(3, views=6, seed=1)
    slots = [montage.draw(3), montage.draw(3)]
    drawn = iter(slots)
    monkeypatch.setattr(montage, "draw", lambda _: next(drawn))
    with torch.no_grad():
        fast, slow = model(batch), slow_mcl(model, batch, slots)
    assert {k for k in fast if k.startswith("loss")} == slow.keys()
    for name, value in slow.items():
        assert fast[name].item() == pytest.approx(value.item(), abs=1e-4)


def test_ways_of_computing_differ_in_batch_statistics_only(small_mcl, make_batch):
    batch = make_batch(4, seed=2)
    models = {compute: small_mcl(compute=compute) for compute in ("all", "windows", "maps")}
    losses, means = {}, {}
    for compute, model in models.items():
        torch.manual_seed(3)
        losses[compute] = total(model.train()(batch)).item()
        norms = model.backbone.bottom_up.stem.conv1, model.backbone.fpn_lateral2
        means[compute] = [conv.norm.running_mean.clone() for conv in norms]
    assert len({round(loss, 4) for loss in losses.values()}) == 3
    stem, lateral = zip(*means.values(), strict=True)
    torch.testing.assert_close(stem[0], stem[1])  # the trunk saw the same canvases
    torch.testing.assert_close(stem[0], stem[2])
    torch.testing.assert_close(lateral[0], lateral[1])
    assert not torch.allclose(lateral[0], lateral[2])
    values = []
    for model in models.values():
        model.load_state_dict(models["all"].state_dict())
        torch.manual_seed(3)
        with torch.no_grad():
            values.append(total(model.eval()(batch)).item())
    assert values == pytest.approx([values[0]] * 3, abs=1e-5)


@pytest.mark.parametrize(
    ("compute", "windows", "target_windows", "target_canvases"),
    [("all", 14_620, 14_620, 172), ("windows", 640, 128, 128), ("maps", 640, 128, 128)],
)
def test_work_of_a_pyramid(
    small_mcl, make_batch, compute, windows, target_windows, target_canvases
):
    """The reference values are for 128 images; 32 have a quarter of each."""
    model = small_mcl(compute=compute).eval()
    seen = {"head": 0, "target head": 0, "canvases": 0, "target canvases": 0}

    def add(name):
        return lambda module, inputs: seen.__setitem__(name, seen[name] + len(inputs[0]))

    model.roi_heads.box_head.register_forward_pre_hook(add("head"))
    model.target["head"].register_forward_pre_hook(add("target head"))
    model.backbone.bottom_up.register_forward_pre_hook(add("canvases"))
    model.target["backbone"].bottom_up.register_forward_pre_hook(add("target canvases"))
    with torch.no_grad():
        model(make_batch(32))
    assert {name: 4 * n // 2 for name, n in seen.items()} == {  # two pyramids
        "head": windows,
        "target head": target_windows,
        "canvases": 172,
        "target canvases": target_canvases,
    }


def test_shapes_of_embeddings(small_mcl, make_batch):
    """Reference for 128 images: 128, 128, 128, 256 rows."""
    model = small_mcl().eval()
    with torch.no_grad():
        query, key = model.pyramids(make_batch(32))
        assert [tuple(v.shape) for v in model._predict(query)] == [(32, 16)] * 3 + [(64, 16)]
        assert {i: tuple(k.shape) for i, k in model._keys(key, 32).items()} == {0: (32, 16)}
    assert not torch.equal(query.images[1], key.images[1])


def test_windows_of_the_maps_of_224_pixels():
    backbone = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model.backbone)
    with torch.no_grad():
        maps = backbone.eval()(torch.randn(1, 3, 224, 224))
    for name, side, windows in (("p2", 56, 64), ("p3", 28, 16), ("p4", 14, 4), ("p5", 7, 1)):
        assert maps[name].shape[-2:] == (side, side)
        assert cut_windows(maps[name], 7).shape[::2] == (windows, 7)


def test_the_head_sees_only_its_own_tile(small_mcl):
    head = small_mcl().eval().roi_heads.box_head
    maps = torch.randn(1, 48, 8, 8)
    other = maps.clone()
    other[:, :, 2:4, 4:6] += 1.0  # window 1 * 4 + 2
    with torch.no_grad():
        a, b = head(cut_windows(maps, 2)), head(cut_windows(other, 2))
    changed = [i for i in range(16) if not torch.equal(a[i], b[i])]
    assert changed == [6]


def test_every_parameter_learns_and_the_target_does_not(small_mcl, make_batch):
    model = small_mcl().train()
    total(model(make_batch(4))).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("target."):
            assert parameter.grad is None and not parameter.requires_grad
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_a_predictor_learns_from_its_own_level_only(small_mcl, make_batch):
    model = small_mcl().train()
    model(make_batch(4))["loss_p4"].backward()
    learned = [all(p.grad is not None for p in m.parameters()) for m in model.predictors]
    touched = [any(p.grad is not None for p in m.parameters()) for m in model.predictors]
    assert learned == touched == [False, True, False, False]


def test_fpn_layers_that_no_tile_reads_are_not_trained(small_mcl, small_montage, make_batch):
    montage = small_montage(size=32, ratios=[1, 2], images_per_canvas=[1, 4])  # on P4 and P3
    model = small_mcl(montage=montage, level_weights=[0.5, 0.5]).train()
    total(model(make_batch(4, size=32, views=4))).backward()
    without = {n for n, p in model.named_parameters() if p.grad is None and "target." not in n}
    assert without == {n for n, p in model.named_parameters() if not p.requires_grad} - {
        n for n in dict(model.named_parameters()) if n.startswith("target.")
    }
    assert {n.split(".")[1] for n in without} == {"fpn_output5", "fpn_lateral2", "fpn_output2"}


def test_labels_are_global(small_mcl, small_montage, make_batch, monkeypatch):
    """Reference: local image 5 of 128 on rank 3 is image 389."""
    model = small_mcl(montage=small_montage())
    batch = make_batch(128)
    vectors = [torch.zeros(n, 4) for n in (128, 128, 128, 256)]
    monkeypatch.setattr(comm, "get_rank", lambda: 3)
    monkeypatch.setattr(model, "_predict", lambda canvases: vectors)
    monkeypatch.setattr(model, "_keys", lambda canvases, n: {0: torch.zeros(512, 4)})
    positives = []

    def record(queries, keys, truth, levels, tau):
        positives.append(truth)
        return SimpleNamespace(loss=torch.zeros(()), positive=0.0, negative=0.0)

    monkeypatch.setattr("region_pretrain.projects.mcl.meta_arch.level_contrast", record)
    model(batch)
    assert positives[0][5] == 389
    for truth in positives:
        assert sorted(set(truth.tolist())) == list(range(384, 512))


def test_the_target_is_updated_after_the_step(small_mcl):
    model = small_mcl()
    assert [model.momentum(k) for k in (0.0, 0.5, 1.0)] == pytest.approx([0.99, 0.995, 1.0])
    before = {k: v.clone() for k, v in model.target["projector"].named_parameters()}
    for name, parameter in model.projector.named_parameters():
        assert torch.equal(before[name], parameter)
    running = model.target["projector"][-1].norm.running_mean.clone()
    with torch.no_grad():
        for parameter in model.projector.parameters():
            parameter.add_(1.0)
        model.projector[-1].norm.running_mean.fill_(9.0)
    with EventStorage() as storage:
        model.after_step(500, 1000)
    assert storage.latest()["target_momentum"][0] == pytest.approx(0.995)
    for name, parameter in model.projector.named_parameters():
        expected = 0.995 * before[name] + 0.005 * parameter
        torch.testing.assert_close(model.target["projector"].get_parameter(name), expected)
    assert torch.equal(model.target["projector"][-1].norm.running_mean, running)
    renew_momentum_copies(model)
    for name, parameter in model.projector.named_parameters():
        assert torch.equal(model.target["projector"].get_parameter(name), parameter)


def test_only_the_backbone(make_batch, small_mcl, tmp_path):
    config = get_config("common/models/mask_rcnn_fpn_small.py").model.backbone
    neck = PseudoLevels(192, 48)
    bottom_up = instantiate(config).bottom_up
    for compute in ("all", "windows", "maps"):
        model = small_mcl(backbone=Trunk(bottom_up=bottom_up), neck=neck, compute=compute).train()
        total(model(make_batch(4))).backward()
        for name, parameter in model.named_parameters():
            assert name.startswith("target.") or parameter.grad is not None, name
    assert model.detector_modules == ("backbone",)
    own, _ = split_state(model)
    assert own.keys() == {f"backbone.bottom_up.{k}" for k in bottom_up.state_dict()}
    torch.save({"model": own}, tmp_path / "model.pth")
    detector = instantiate(get_config("common/models/mask_rcnn_fpn_small.py").model)
    report = load_pretrained(detector, str(tmp_path / "model.pth"))
    assert sorted(report.matched) == sorted(own) and not report.unexpected
    assert any(k.startswith("target.neck.reduce") for k in model.state_dict())
    c5 = torch.randn(3, 192, 2, 2)
    with torch.no_grad():
        maps = neck.eval()({"res5": c5}, {"p5": slice(0, 3), "p3": slice(1, 3)})
    assert (maps["p5"] >= 0).all() and maps["p3"].shape == (2, 48, 8, 8)
    for y in range(8):
        for x in range(8):
            assert torch.equal(maps["p3"][:, :, y, x], maps["p5"][1:, :, y // 4, x // 4])


def test_a_trunk_of_another_stride_is_refused():
    detector = get_config("detection/mask_rcnn_vitdet_b.py").model
    with pytest.raises(UserError, match="trunk_only=True computes P5 from a map of stride 32, and"):
        mcl(detector, trunk_only=True)


def test_the_checkpoint_stores_the_filter(small_mcl, small_montage):
    codes = {
        how: small_mcl(montage=small_montage(shrink=how)).state_dict()["shrink_filter"].item()
        for how in ("nearest", "area", "bilinear")
    }
    assert codes == {"nearest": 0, "area": 1, "bilinear": 2}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (dict(compute="few"), "model.compute=few: must be one of all, windows, maps"),
        (dict(temperature=0.0), "model.temperature=0.0: must be above 0"),
        (
            dict(level_weights=[1.0]),
            "model.level_weights=.* for each of the 4 montage.ratios",
        ),
        (dict(pairing="bottom"), "model.pairing=bottom"),
    ],
)
def test_invalid_arguments_are_reported(small_mcl, overrides, message):
    with pytest.raises(UserError, match=message):
        small_mcl(**overrides)


def test_tiles_that_fit_no_map_are_reported(small_mcl, small_montage, make_batch):
    with pytest.raises(UserError, match="size=96 with ratio 1 .* stride 48.*4, 8, 16, 32"):
        small_mcl(montage=small_montage(size=96))
    with pytest.raises(UserError, match="4 ratios at 64 pixels.*2 x 4 such views"):
        small_mcl()(make_batch(4, views=6))
    views = make_batch(4).views[:7] + make_batch(4, size=32).views[:1]
    with pytest.raises(UserError, match="32, 32"):
        small_mcl()(ViewBatch(views, torch.arange(4)))


def test_meta_architecture_is_registered():
    from detectron2.modeling import META_ARCH_REGISTRY

    assert META_ARCH_REGISTRY.get("MCL") is MCL
