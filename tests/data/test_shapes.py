"""Shapes: annotations match the rendered images."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import shapely
from detectron2.data import DatasetCatalog
from forked import LONG
from pycocotools.coco import COCO
from shapely.geometry import Polygon

from region_pretrain.data.generated import make_scenes
from region_pretrain.data.shapes import (
    CLASSES,
    LEVELS,
    Difficulty,
    ShapesSpec,
    get_difficulty,
    render_scene,
    shapes,
)
from region_pretrain.data.shapes.materials import MATERIALS
from region_pretrain.data.shapes.outlines import OUTLINES, sample_outline
from region_pretrain.data.shapes.scene import _coverage, _rings
from region_pretrain.errors import UserError


@pytest.fixture(autouse=True)
def _datasets(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))


@pytest.mark.parametrize("name", OUTLINES)
def test_outlines_are_simple_polygons_of_unit_size(name):
    for seed in range(30):
        outline = sample_outline(name, np.random.default_rng(seed))
        polygon = Polygon(outline)
        assert polygon.is_valid and polygon.area > 0.25
        assert np.linalg.norm(outline, axis=1).max() == pytest.approx(1)
        np.testing.assert_allclose(outline.min(0) + outline.max(0), 0, atol=1e-9)


@pytest.mark.parametrize("name", MATERIALS)
def test_materials_are_standardised(name):
    field = MATERIALS[name](90, 70, 5.0, np.random.default_rng(0))
    assert field.shape == (90, 70) and field.dtype == np.float32
    assert field.mean() == pytest.approx(0, abs=1e-4) and field.std() == pytest.approx(1, abs=1e-3)


def test_coverage_is_the_fraction_of_the_pixel():
    square = np.array([(2.5, 3.25), (6.5, 3.25), (6.5, 5.25), (2.5, 5.25)])
    coverage = _coverage([square], 10)
    # An eighth of a pixel is the renderer's own step.
    assert 4 * 2 <= coverage.sum() <= 4.13 * 2.13
    expected = np.zeros((10, 10))
    expected[4, 3:6] = 1
    inside = expected == 1
    assert (coverage[inside] == 1).all()
    assert coverage[3, 4] == pytest.approx(0.75, abs=0.26)
    assert coverage[:3].max() == 0 and coverage[6:].max() == 0


def test_rings_of_a_polygon_with_a_hole_cover_it_exactly():
    hollow = Polygon(
        [(0, 0), (10, 0), (10, 10), (0, 10)],
        [[(2, 2), (4, 2), (4, 4), (2, 4)], [(6, 6), (8, 6), (8, 8), (6, 8)]],
    )
    parts = [Polygon(ring) for ring in _rings(hollow)]
    assert shapely.union_all(parts).symmetric_difference(hollow).area == pytest.approx(0)
    assert sum(p.area for p in parts) == pytest.approx(hollow.area)


@pytest.mark.parametrize("level", LEVELS)
def test_annotations_are_the_visible_parts(level):
    difficulty = LEVELS[level]
    for seed in range(6):
        scene = render_scene(96, difficulty, np.random.default_rng(seed))
        assert 1 <= len(scene.objects) <= difficulty.objects[1]
        union = 0.0
        for i, item in enumerate(scene.objects):
            visible = shapely.union_all([Polygon(r) for r in item.visible])
            whole = item.polygon.intersection(shapely.box(0, 0, 96, 96))
            above = shapely.union_all([o.polygon for o in scene.objects[i + 1 :]])
            assert visible.symmetric_difference(whole.difference(above)).area < 1e-6
            assert item.area >= (1 - difficulty.occlusion) * item.polygon.area - 1e-6
            assert item.bbox == pytest.approx(visible.bounds)
            union += item.area
        everything = shapely.union_all([o.polygon for o in scene.objects])
        assert union == pytest.approx(everything.intersection(shapely.box(0, 0, 96, 96)).area)


def test_an_object_is_drawn_where_its_polygon_is():
    """Without texture, clutter and noise, ground and object are two colours, blurred at the edge.

    Two colours explain the picture best if the object's mask is not shifted.
    """
    plain = Difficulty(
        objects=(1, 1), contrast=(0.4, 0.4), texture=0.0, ground_texture=1e-6, clutter=0, noise=0.0,
        saturation=0.0, object_saturation=0.0,
    )  # fmt: skip
    shifts = [(x, y) for x in range(-2, 3) for y in range(-2, 3)]
    found = []
    for seed in range(10):
        scene = render_scene(128, plain, np.random.default_rng(seed))
        grey = scene.image[..., 0].astype(float).ravel()
        errors = []
        for shift in shifts:
            polygons = [polygon + np.float32(shift) for polygon in scene.objects[0].visible]
            mask = _coverage(polygons, 128).astype(float).ravel()
            two = np.stack([mask, 1 - mask], axis=1)
            fitted = two @ np.linalg.lstsq(two, grey, rcond=None)[0]
            errors.append(np.square(grey - fitted).mean())
        found.append(shifts[int(np.argmin(errors))])
    assert found == [(0, 0)] * 10


def test_scenes_are_nearly_grey_and_of_equal_contrast():
    for seed in range(20):
        image = render_scene(96, LEVELS["hard"], np.random.default_rng(seed)).image.astype(float)
        grey = image.mean(axis=2)
        assert grey.mean() == pytest.approx(127.5, abs=6)
        assert grey.std() == pytest.approx(0.19 * 255, rel=0.15)
        # The difference between channels is the same everywhere: a tint, not object colours.
        difference = image[..., 0] - image[..., 2]
        assert difference.std() < 0.15 * grey.std()


def test_the_fraction_of_typical_materials_is_the_configured_one():
    difficulty = get_difficulty("easy", typical=0.6)
    rng = np.random.default_rng(0)
    items = [o for _ in range(150) for o in render_scene(48, difficulty, rng).objects]
    share = np.mean([o.category == o.material for o in items])
    assert share == pytest.approx(0.6, abs=4 * np.sqrt(0.24 / len(items)))
    assert {o.category for o in items} == set(range(len(CLASSES)))


def test_the_same_seed_gives_the_same_files_whatever_the_size_and_workers(tmp_path, monkeypatch):
    few = make_scenes(ShapesSpec("val", 3, side=48), workers=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "again"))
    many = make_scenes(ShapesSpec("val", 120, side=48), workers=2)
    for i in range(3):
        name = f"images/{i:06d}.png"
        assert (few / name).read_bytes() == (many / name).read_bytes()
    first, second = (json.loads((d / "annotations.json").read_text()) for d in (few, many))
    assert first["annotations"] == second["annotations"][: len(first["annotations"])]
    train = make_scenes(ShapesSpec("train", 1, side=48))
    assert (train / "images/000000.png").read_bytes() != (few / "images/000000.png").read_bytes()


#: Jobs on a cluster ignore SIGTERM, and so do their child processes.
IN_A_JOB = """
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
from region_pretrain.data.generated import make_scenes
from region_pretrain.data.shapes import ShapesSpec
for seed in range(8):  # the failure is random
    make_scenes(ShapesSpec("val", 100, 32, seed), workers=2)
"""


def test_generation_finishes_where_sigterm_is_ignored(tmp_path):
    environment = {**os.environ, "DETECTRON2_DATASETS": str(tmp_path)}
    subprocess.run([sys.executable, "-c", IN_A_JOB], env=environment, check=True, timeout=LONG)
    made = list(tmp_path.rglob("annotations.json"))
    assert [len(json.loads(path.read_text())["images"]) for path in made] == [100] * 8


def test_home_is_expanded_in_the_folder_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "~/data")
    assert ShapesSpec("val", 3).folder.parent == tmp_path / "data/shapes"


def test_an_image_that_cannot_be_written_ends_the_generation(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setattr("cv2.imwrite", lambda *args: False)  # what it returns on a full disk
    with pytest.raises(OSError, match=r"cannot write .*000000\.png"):
        make_scenes(ShapesSpec("val", 1, side=48), workers=1)


def test_the_json_is_coco_with_masks_of_the_right_area():
    folder = make_scenes(ShapesSpec("train", 8, side=128))
    coco = COCO(str(folder / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for annotation in coco.loadAnns(coco.getAnnIds()):
        mask = coco.annToMask(annotation)
        perimeter = sum(Polygon(np.reshape(s, (-1, 2))).length for s in annotation["segmentation"])
        assert abs(mask.sum() - annotation["area"]) < 0.4 * perimeter
        ys, xs = np.nonzero(mask)
        x, y, w, h = annotation["bbox"]
        assert xs.min() >= x - 1 and xs.max() + 1 <= x + w + 1
        assert ys.min() >= y - 1 and ys.max() + 1 <= y + h + 1


def test_registered_by_name_and_generated_on_first_use():
    name = shapes("val", 2, side=48, seed=5, level="hard", clutter=0)
    assert name == shapes("val", 2, side=48, seed=5, level="hard", clutter=0)
    records = DatasetCatalog.get(name)
    assert len(records) == 2 and records[0]["width"] == 48
    assert {"shapes_unlabeled", "shapes_train", "shapes_val"} <= set(DatasetCatalog.list())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shapes("test", 1), "no split 'test'"),
        (lambda: shapes("val", 1, level="insane"), "clear, easy, medium, hard"),
        (lambda: shapes("val", 1, colour=3), "colour"),
        (lambda: shapes("val", 0), "size >= 1"),
    ],
)
def test_wrong_names_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_in_clear_scenes_the_material_determines_the_class():
    shown = set()
    for seed in range(40):
        for item in render_scene(96, LEVELS["clear"], np.random.default_rng(seed)).objects:
            assert item.material == item.category
            shown.add(item.category)
    assert shown == set(range(len(CLASSES)))
