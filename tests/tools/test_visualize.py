"""Pictures of views: the samples of the run, with one colour per region."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import instantiate
from forked import run_tool
from PIL import Image

from region_pretrain.commands.visualize import main
from region_pretrain.config import load_config
from region_pretrain.data.batch import View, ViewBatch
from region_pretrain.data.photometry import IDENTITY, PhotometryLayout
from region_pretrain.reporting.pictures import first_views, sheet, view_pictures

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"
OVERRIDES = [
    "dataloader.train.dataset.names.size=6",
    "dataloader.train.dataset.regions=null",  # the only region of every image is the whole image
    "dataloader.train.total_batch_size=6",
    "train.seed=3",
]


@pytest.fixture(autouse=True)
def datasets(tmp_path_factory, monkeypatch):
    root = tmp_path_factory.getbasetemp() / "visualize_datasets"
    monkeypatch.setenv("DETECTRON2_DATASETS", str(root))


@pytest.fixture
def cfg():
    return load_config(str(CONFIG), OVERRIDES)


def make_batch(solarize=False):
    """One grey image in two views of 120 and 60 pixels; region 7 in both, 8 in the first only."""
    row = IDENTITY.copy()
    if solarize:
        row[PhotometryLayout.SOLARIZE_FROM] = 0.5
    views = []
    for side, boxes, ids, valid in (
        (120, [[10, 20, 60, 90], [70, 30, 110, 80], [5, 5, 9, 9]], [7, 8, 9], [True, True, False]),
        (60, [[6, 12, 40, 50]], [7], [True]),
    ):
        views.append(
            View(
                images=torch.full((1, 3, side, side), 200, dtype=torch.uint8),
                boxes=torch.tensor([boxes], dtype=torch.float32),
                valid=torch.tensor([valid]),
                region_ids=torch.tensor([ids]),
                affine=torch.zeros(1, 2, 3),
                photometry=torch.from_numpy(row)[None],
            )
        )
    return ViewBatch(views, torch.zeros(1, dtype=torch.int64))


def test_same_region_has_the_same_colour_and_invalid_slots_are_not_drawn():
    ((first, second),) = view_pictures(make_batch())
    assert first.shape == (360, 360, 3) and second.shape == (360, 360, 3)  # 3 and 6 times
    left_edge = first[200, 30], second[200, 36]  # x = 10 * 3 and 6 * 6, below the label
    assert (left_edge[0] == left_edge[1]).all() and np.ptp(left_edge[0]) > 50
    lonely = first[150, 210]  # x = 70 * 3: in one view only, so grey
    assert np.ptp(lonely) == 0 and not (lonely == 200).all()
    assert (first[10:30, 10:28] == 200).all()  # the invalid slot's box


def test_pixels_are_those_after_photometry():
    ((first, _),) = view_pictures(make_batch(solarize=True))
    assert (first[330, 330] == 55).all()  # 255 - 200


def test_the_views_are_the_first_of_the_run(cfg):
    loader = cfg.dataloader.train.copy()
    loader.seed = 3
    loader.num_workers = 0
    batch = next(iter(instantiate(loader).iterate(0, 1)))  # all 6
    mine = first_views(cfg, 2)
    assert len(mine) == 2 and mine.indices.tolist() == batch.indices[:2].tolist()
    for a, b in zip(mine.views, batch.views, strict=True):
        assert (a.images == b.images[:2]).all() and (a.boxes == b.boxes[:2]).all()
        assert (a.photometry == b.photometry[:2]).all()


def test_a_sheet_stacks_its_rows():
    red, blue = np.full((10, 20, 3), (255, 0, 0)), np.full((40, 20, 3), (0, 0, 255))
    picture = sheet([[red.astype(np.uint8), blue.astype(np.uint8)]] * 3, height=20)
    assert picture.shape == (3 * 28 + 8, 40 + 10 + 3 * 8, 3)
    for row in range(3):
        assert (picture[8 + 28 * row : 28 + 28 * row, 8:48] == (255, 0, 0)).all()
        assert (picture[8 + 28 * row : 28 + 28 * row, 56:66] == (0, 0, 255)).all()
    assert (picture[:8] == 255).all()


def run(*args):
    return run_tool("visualize.py", "--config-file", CONFIG, *args)


def test_command_line_writes_the_picture(cfg, tmp_path):
    (tmp_path / "more.txt").write_text("\n".join(OVERRIDES[1:]))
    flags = ["--output", str(tmp_path / "v.png"), "--height", "60"]
    done = run("--num", "2", OVERRIDES[0], *flags, f"@{tmp_path}/more.txt")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "v.png") as image:
        pixels = np.asarray(image.convert("RGB"))
    assert (pixels == sheet(view_pictures(first_views(cfg, 2)), 60)).all()


def test_command_line_refuses_a_missing_store_in_one_line(tmp_path):
    missing = f"dataloader.train.dataset.regions={tmp_path}/none.arrow"
    done = run(*OVERRIDES, missing)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and last.startswith("error: ") and "none.arrow" in last
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("output", ["", "v.txt"])
def test_command_line_refuses_an_output_that_is_no_picture(tmp_path, output, capsys):
    with pytest.raises(SystemExit):
        main(["--config-file", str(CONFIG), *OVERRIDES, "--output", str(tmp_path / output)])
    assert f"--output {tmp_path / output}: name a file that ends in .png" in capsys.readouterr().err


def test_command_line_refuses_to_write_among_the_images(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    names = f"dataloader.train.dataset.names=folder://{tmp_path}"
    done = run(*OVERRIDES, names, "--output", str(tmp_path / "views.png"))
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "would become one of the images" in last
    assert sorted(os.listdir(tmp_path)) == ["a.png"]
