"""``region_pretrain.make_regions`` and ``pretrain``, in this process."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import LazyConfig, instantiate
from detectron2.engine import HookBase
from narrow import SMALL, narrow_config
from PIL import Image

import region_pretrain as rp
from region_pretrain.config import changed_keys, load_file
from region_pretrain.engine.build import build_part
from region_pretrain.engine.methods import load_method
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.modeling.given import as_lazy_detector, weights_kept
from region_pretrain.modeling.meta_arch import detector_part
from region_pretrain.regions.preview import draw_preview
from region_pretrain.reporting import pictures


def arguments(region_folder, output_dir, **changes):
    return {
        "images": region_folder.images,
        "detector": narrow_config(),
        "regions": rp.RegionStore.open(region_folder.store),
        "steps": 4,
        "batch_size": 4,
        "output_dir": output_dir,
        "overrides": SMALL,
        **changes,
    }


def losses(run):
    return [row["total_loss"] for row in run.history()]


def test_the_import_is_fast_and_every_name_is_found():
    code = (
        "import sys, region_pretrain as rp\n"
        "assert not {'torch', 'detectron2', 'numpy'} & set(sys.modules)\n"
        "assert all(hasattr(rp, name) for name in rp.__all__), rp.__all__\n"
        "assert set(rp.__all__) <= set(dir(rp))\n"
        "try:\n    rp.pretrian\n"
        "except AttributeError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "module 'region_pretrain' has no attribute 'pretrian'\n"
    assert "Warning" not in done.stderr


def test_regions_are_those_of_the_command_line(region_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    regions = rp.make_regions(region_folder.images, recipe="shapes-v1", workers=1)
    assert isinstance(regions, rp.RegionStore)
    assert re.fullmatch("regions/images-[0-9a-f]{8}-shapes-v1.arrow", os.path.relpath(regions.path))
    assert len(regions) == regions.summary["images"] == 12
    assert str(regions).splitlines()[1] == "images: 12, and 0 unreadable files skipped"
    for key, boxes in region_folder.boxes.items():
        assert np.array_equal(regions.boxes(key), boxes)
    drawn = np.asarray(regions.show(3))
    with Image.open(draw_preview(regions.records, regions, "p.png", 3)) as picture:
        assert np.array_equal(drawn, np.asarray(picture.convert("RGB")))
    grid = rp.make_regions(region_folder.images, recipe="grid-v1", overlap=0.3, out="g.arrow")
    assert grid.manifest["recipe"] == "grid-v1+overlap=0.3"
    by_method = rp.make_regions(region_folder.images, "soco", out="s.arrow", workers=1)
    assert by_method.manifest["recipe"] == "soco-v1"
    name = os.path.basename(regions.records[0]["file_name"])
    rows = ["file_name,x0,y0,x1,y1,score", f"{name},1,2,30,40,0.4", f"{name},5,6,20,40,0.9"]
    Path("boxes.csv").write_text("\n".join([*rows, f"{name},0,0,9,9,0.2"]))
    given = rp.make_regions(region_folder.images, boxes="boxes.csv", min_score=0.3, workers=1)
    assert re.fullmatch(r"file-v1\+min_score=0.3\+source=\w{16}", given.manifest["recipe"])
    key = str(regions.records[0]["image_id"])
    assert given.boxes(key).tolist() == [[5, 6, 20, 40], [1, 2, 30, 40]]
    assert given.summary["boxes"] == 2


def test_a_run_is_that_of_the_command_line(region_folder, tmp_path):
    seen = []
    run = rp.pretrain(
        "soco",
        **arguments(region_folder, tmp_path / "a"),
        callbacks=[lambda trainer: seen.append((trainer.iter, trainer.module.training))],
    )
    assert seen == [(i, True) for i in range(4)]
    assert not run.model.training and type(run.model).__name__ == "SoCo"
    assert run.metrics["iteration"] == 3 and run.metrics["total_loss"] == losses(run)[-1]
    assert repr(run).startswith(f"Pretrained(SoCo, '{tmp_path}/a/model_final.pth', total_loss=")
    assert run.plot("total_loss", "lr").size == (960, 600)

    path = tmp_path / "detector.yaml"
    LazyConfig.save(narrow_config(), str(path))
    overrides = [
        f"dataloader.train.dataset.names=folder://{region_folder.images}",
        f"dataloader.train.dataset.regions={region_folder.store}",
        "dataloader.train.dataset.recipe=shapes-v1",
        "dataloader.train.total_batch_size=4",
        "train.max_iter=4",
        f"train.output_dir={tmp_path}/a",
    ]
    cfg = load_method("soco", str(path), [*SMALL, *overrides])
    assert changed_keys(load_file(f"{tmp_path}/a/config.yaml"), cfg) == {}
    # Not from the file, whose keys are sorted: modules would draw their weights in another order.
    cfg = load_method("soco", narrow_config(), [*SMALL, *overrides])
    cfg.train.output_dir = f"{tmp_path}/b"
    do_pretrain(cfg)
    rows = rp.pretrain("soco", **arguments(region_folder, tmp_path / "b"), resume=True).history()
    assert losses(run) == [row["total_loss"] for row in rows]

    stock = instantiate(narrow_config().model)
    DetectionCheckpointer(stock).load(run.checkpoint)
    trained = detector_part(run.model).state_dict()
    assert len(trained) > 50
    assert all(torch.equal(stock.state_dict()[name], value) for name, value in trained.items())


def test_views_are_drawn_before_and_after_a_run(region_folder, tmp_path):
    given = arguments(region_folder, tmp_path / "a")
    cfg = rp.pretrain_config("soco", **given)
    expected = pictures.sheet(pictures.pictures(cfg, pictures.first_views(cfg, 2)))
    assert np.array_equal(np.asarray(rp.show_views(cfg, 2)), expected)
    assert np.array_equal(np.asarray(rp.show_views("soco", 2, **given)), expected)
    run = rp.pretrain(cfg)
    assert np.array_equal(np.asarray(rp.show_views(run, 2)), expected)
    with pytest.raises(rp.UserError, match="SoCo draws no pictures of its own"):
        rp.show_views(run, own=True)


@pytest.mark.parametrize("method", ["soco", "point_region"])
def test_pictures_leave_a_built_detector_alone(region_folder, tmp_path, method):
    detector = instantiate(narrow_config().model)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    given = arguments(region_folder, tmp_path / "a", detector=detector)
    if method == "point_region":
        del given["regions"]
        given["overrides"] = SMALL[1:5]
    try:
        rp.show_views(method, 2, own=True, **given)
    except rp.UserError as error:
        assert method == "soco" and "draws no pictures of its own" in str(error)
    assert all(torch.equal(value, before[name]) for name, value in detector.state_dict().items())
    assert all(p.requires_grad for p in detector.parameters()) and all(
        module.training for module in detector.modules()
    )


def test_pictures_before_a_run_are_of_its_initial_weights(region_folder, tmp_path, monkeypatch):
    seen = []

    def look(self, batch):
        seen.append({name: value.clone() for name, value in self.state_dict().items()})

    monkeypatch.setattr("region_pretrain.projects.soco.SoCo.pictures", look)
    detector = built()
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    given = arguments(region_folder, tmp_path / "a", detector=detector)
    with pytest.raises(rp.UserError, match="draws no pictures"):
        rp.show_views("soco", 1, own=True, **given)
    weights = str(tmp_path / "weights.pth")
    torch.save({"model": {k: v + 1 for k, v in before.items() if v.is_floating_point()}}, weights)
    with pytest.raises(rp.UserError, match="draws no pictures"):
        rp.show_views("soco", 1, own=True, init=weights, **given)
    name = next(name for name in before if name.endswith("res2.0.conv2.norm.weight"))
    for drawn, more in zip(seen, (0, 1), strict=True):
        copies = [value for key, value in drawn.items() if key.endswith(name)]
        assert len(copies) == 2  # the online network's and the momentum copy's
        assert all(torch.equal(value, before[name] + more) for value in copies)
    assert all(torch.equal(v, before[k]) for k, v in detector.state_dict().items())


def test_folders_with_equal_names_and_files_have_their_own_regions(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {"recipe": "shapes-v1", "workers": 1}
    for site, side in (("a", 20), ("b", 40)):
        (tmp_path / site / "images").mkdir(parents=True)
        image = np.full((64, 64, 3), 120, np.uint8)
        image[8 : 8 + side, 8 : 8 + side] = (250, 20, 20)
        Image.fromarray(image).save(tmp_path / site / "images/0001.png")
    a, b = (rp.make_regions(tmp_path / site / "images", **given) for site in "ab")
    assert a.path != b.path and not np.array_equal(a.boxes("0001.png"), b.boxes("0001.png"))
    assert rp.make_regions("a/images", **given).path == a.path  # the same folder


def test_missing_regions_are_made_in_the_output_folder(region_folder, tmp_path):
    images = shutil.copytree(region_folder.images, tmp_path / "mine")
    given = arguments(region_folder, tmp_path / "a", regions=None, images=images, steps=1)
    run = rp.pretrain("soco", **given)
    (path,) = (tmp_path / "a").glob("regions-*.arrow")
    store = rp.RegionStore.open(path)
    assert (store.manifest["recipe"], len(store)) == ("soco-v1", 12)
    assert run.config.dataloader.train.dataset.regions == str(path)

    # Neither a second call nor a resumption changes the regions of the run.
    shutil.copy(next(images.glob("*.png")), images / "new.png")
    before = path.read_bytes()
    with pytest.raises(rp.UserError, match="already contains a run"):
        rp.pretrain("soco", **given)
    with pytest.raises(rp.UserError, match="training data is not that of|has no regions for 1"):
        rp.pretrain("soco", resume=True, **given)
    assert path.read_bytes() == before
    (images / "new.png").unlink()
    assert rp.pretrain("soco", resume=True, **given).metrics == run.metrics


class Stop(HookBase):
    def after_step(self):
        if self.trainer.iter == 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_saves_a_checkpoint_from_which_the_run_continues(region_folder, tmp_path):
    complete = rp.pretrain("soco", **arguments(region_folder, tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt, match="resume=True"):
        rp.pretrain("soco", **arguments(region_folder, tmp_path / "b"), callbacks=Stop())
    assert os.path.exists(tmp_path / "b/model_0000001.pth")
    resumed = rp.pretrain("soco", **arguments(region_folder, tmp_path / "b"), resume=True)
    assert losses(resumed) == losses(complete)
    with pytest.raises(rp.UserError, match="already contains a run.*resume=True in Python"):
        rp.pretrain("soco", **arguments(region_folder, tmp_path / "b"))


def built():
    torch.manual_seed(3)
    return instantiate(narrow_config().model)


def test_the_modules_of_a_built_detector_are_trained(region_folder, tmp_path):
    detector = built().eval()
    detector.backbone.bottom_up.stem.conv1.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in detector.state_dict().items()}
    modes = [p.requires_grad for p in detector.parameters()]
    given = {"detector": detector, "overrides": [*SMALL, "optimizer.lr=0"]}
    given = arguments(region_folder, tmp_path / "a", **given)
    with pytest.raises(rp.UserError, match="freezes layers without weights"):
        rp.pretrain("soco", **given)
    detector.backbone.bottom_up.stem.conv1.weight.requires_grad_(True)
    rp.pretrain("soco", **given)
    # Not even the method's zero initialisation changes the given weights.
    for name, parameter in detector.named_parameters():
        assert torch.equal(parameter, before[name]), name

    given |= {"overrides": SMALL, "output_dir": tmp_path / "b"}
    run = rp.pretrain("soco", **given)
    changed = {n for n, p in detector.named_parameters() if not torch.equal(p, before[n])}
    trained = {n for n, _ in detector_part(run.model).named_parameters()}
    # No region is large enough for the two coarsest levels, and norms have no weight decay.
    unused = {f"backbone.fpn_output{i}.norm.{n}" for i in (4, 5) for n in ("weight", "bias")}
    assert changed == trained - unused
    assert run.detector is detector and not detector.training
    assert [p.requires_grad for p in detector.parameters()] == [True] * len(modes)
    assert run.model.backbone is detector.backbone
    resumed = rp.pretrain("soco", **given, resume=True)
    assert losses(resumed) == losses(run)


@pytest.mark.parametrize("method", ["SoCo", "CCOP", "MCL", "MoCo", "BYOL", "PointRegionContrast"])
def test_every_method_shares_the_modules_of_a_built_detector(method):
    detector = built()
    cfg = load_method(method, detector)
    with weights_kept(detector):
        model = build_part(cfg.model, "model")
    part = detector_part(model)
    mine = {id(p) for p in detector.parameters()}
    assert part.state_dict() and all(id(p) in mine for p in part.parameters())
    reference = load_method(method, narrow_config())
    names = [name for name, _ in detector_part(build_part(reference.model, "")).named_parameters()]
    assert [name for name, _ in part.named_parameters()] == names


def test_a_config_does_not_outlive_the_detector_that_it_refers_to():
    detector = built()
    node = as_lazy_detector(detector)
    assert instantiate(node.backbone) is detector.backbone
    other = built()
    assert instantiate(as_lazy_detector(other).backbone) is other.backbone
    assert instantiate(node.backbone) is detector.backbone
    del detector
    with pytest.raises(rp.UserError, match="the detector object GeneralizedRCNN-.*exists only in"):
        instantiate(node.backbone)


def test_records_are_data(region_folder, tmp_path):
    from detectron2.data import DatasetCatalog

    records = [
        {"file_name": region_folder.images / key, "image_id": key} for key in region_folder.boxes
    ]
    given = arguments(region_folder, tmp_path / "a", images=records)
    run = rp.pretrain("soco", **given)
    folder = rp.pretrain("soco", **arguments(region_folder, tmp_path / "b"))
    assert losses(run) == losses(folder)
    assert run.config.dataloader.train.dataset.names not in DatasetCatalog
    assert np.array_equal(np.asarray(rp.show_views(run)), np.asarray(rp.show_views(folder)))
    with pytest.raises(rp.UserError, match="a config cannot contain records"):
        rp.pretrain_config("soco", **given)


BAD = [
    ({"images": "absent"}, "no data set is called 'absent', and there is no such folder"),
    ({"images": "absent/"}, "images='absent/': there is no such folder"),
    ({"images": "absent/*.jpg"}, "no such folder; for single images, pass records"),
    ({"images": [{"image_id": 3}]}, r"images\[0\]: a record needs 'file_name'"),
    ({"images": 3}, "images=3: must be a folder"),
    ({"images": ("absent", "a.json")}, "the json comes first, then the folder"),
    ({"images": ("a.json", "absent")}, "images: there is no a.json"),
    ({"detector": None}, "method 'soco' needs detector="),
    ({"detector": 3}, "detector=3: must be a config"),
    ({"detector": torch.nn.Linear(1, 1)}, "Linear is not a detector: it lacks backbone"),
    ({"detector": "absent.yaml"}, "no config file absent.yaml"),
    ({"method": "simclr"}, "simclr: must be one of BYOL, CCOP"),
    ({"epochs": 2}, "steps= and epochs= exclude each other"),
    ({"overrides": [*SMALL, "train.epochs=2"]},
     "^steps=4 replaces the override 'train.epochs=2': give one of them$"),
    ({"steps": None, "epochs": 1, "overrides": ["train.max_iter=2"]},
     "^epochs=1 replaces the override 'train.max_iter=2': give one of them$"),
    ({"init": 3}, "init=3: must be a finished run"),
    ({"init": "absent.pth"}, "there is no absent.pth: name the folder of a finished run"),
    ({"init": "tests"}, "there is no tests/model_final.pth: name the folder of a finished run"),
    ({"callbacks": 3}, "callbacks: 3 is neither a function"),
    ({"callbacks": Stop}, "neither a function nor a HookBase object"),
    ({"overrides": ["train.x=1"]}, "train.x"),
    ({"overrides": "train.x=1"}, "overrides='train.x=1': must be a list of key=value"),
    ({"batch_size": 13}, "12 images, fewer than one batch"),
    ({"regions": "absent.arrow"}, "no region store absent.arrow"),
    ({"method": rp.get_config("detection/mask_rcnn_r18_fpn_shapes.py"), "detector": None,
      "overrides": []}, "not a pre-training config"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_arguments_are_one_error(region_folder, tmp_path, changes, message):
    given = {"method": "soco", **arguments(region_folder, tmp_path / "a"), **changes}
    with pytest.raises(rp.UserError, match=message) as error:
        rp.pretrain(**given)
    assert "\n" not in str(error.value)


def test_bad_arguments_of_regions(region_folder):
    for given in ({}, {"method": "soco", "boxes": "boxes.csv"}):
        with pytest.raises(rp.UserError, match="needs one of method=, recipe= and boxes="):
            rp.make_regions(region_folder.images, **given)
    with pytest.raises(rp.UserError, match="no such file or folder of boxes: boxes.csv"):
        rp.make_regions(region_folder.images, boxes="boxes.csv")
    with pytest.raises(rp.UserError, match="method byol needs no regions"):
        rp.make_regions(region_folder.images, "byol")
    with pytest.raises(rp.UserError, match="overlop"):
        rp.make_regions(region_folder.images, recipe="grid-v1", overlop=1)


def test_the_default_store_is_that_of_the_absolute_path(coco_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    relative = os.path.relpath(coco_folder)
    for root in (coco_folder, relative):
        rp.make_regions((f"{root}/ann.json", f"{root}/images"), recipe="grid-v1", workers=1)
    assert len(list((tmp_path / "regions").glob("*.arrow"))) == 1


def test_a_data_sets_own_annotations_are_not_boxes_of_another_program(coco_folder, tmp_path):
    data = (str(coco_folder / "ann.json"), str(coco_folder / "images"))
    for images in (data, [f"coco://{data[0]}?images={data[1]}"]):
        with pytest.raises(rp.UserError, match="ann.json has the annotations of coco://"):
            rp.make_regions(images, boxes=coco_folder / "ann.json", out=tmp_path / "r.arrow")
    assert not (tmp_path / "r.arrow").exists()
