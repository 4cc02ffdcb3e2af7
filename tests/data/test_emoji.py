"""Emoji: annotations match the composed images. The drawings are those of fake vendors."""

import hashlib
import json

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from detectron2.data.detection_utils import annotations_to_instances
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from region_pretrain.data.emoji import (
    CLASSES,
    LEVELS,
    SPLIT_VENDORS,
    VENDORS,
    Difficulty,
    EmojiSpec,
    emoji,
    get_difficulty,
    render_scene,
    scene,
)
from region_pretrain.data.emoji.scene import photographs, recolour
from region_pretrain.data.emoji.vendors import vendor_folder
from region_pretrain.data.generated import make_scenes
from region_pretrain.data.masks import MaskCount
from region_pretrain.errors import UserError

TRAIN = SPLIT_VENDORS["train"]

#: Of images and annotations of three scenes.
DIGESTS = {
    "easy/unlabeled": "01b89ca10e56f987",
    "easy/train": "045ce7fbe4844361",
    "easy/val": "6334860b4134b934",
    "medium/unlabeled": "3f9aed707362df07",
    "medium/train": "7e971da89bdd1d4b",
    "medium/val": "fc9af5fefde2200f",
    "hard/unlabeled": "bcda6c007f1fc61b",
    "hard/train": "a744c97e2486b43a",
    "hard/val": "5abe55f6d4f52c95",
}


@pytest.fixture(scope="module")
def fake_cache(tmp_path_factory):
    """A cache where each vendor has one random polygon with a hole per class."""
    root = tmp_path_factory.mktemp("fake")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root))
        for v, vendor in enumerate(VENDORS):
            folder = vendor_folder(vendor)
            folder.mkdir(parents=True)
            for c, name in enumerate(CLASSES):
                rng = np.random.default_rng([v, c])
                pixels = np.zeros((128, 128, 4), np.uint8)
                pixels[..., :3] = rng.integers(0, 256, (128, 128, 3))
                alpha = np.zeros((128, 128), np.uint8)
                corners = rng.integers(5, 123, (8, 2)).astype(np.int32)
                cv2.fillPoly(alpha, [cv2.convexHull(corners)], 255)
                alpha[60:68, 60:68] = 0
                pixels[..., 3] = alpha
                Image.fromarray(pixels).save(folder / f"{name}.png")
    return root


@pytest.fixture(autouse=True)
def _folders(tmp_path, monkeypatch, fake_cache):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(fake_cache))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("level", LEVELS)
def test_image_and_masks_equal_a_slow_composition(level, monkeypatch):
    side = 48
    ground = rng(9).uniform(0, 255, (side, side, 3))
    monkeypatch.setattr(scene, "_draw_ground", lambda *_: ground.copy())
    for seed in range(4):
        result = render_scene(side, get_difficulty(level, noise=0.0), TRAIN, rng(seed))
        owner, image = np.full((side, side), -1), ground.copy()
        for y in range(side):
            for x in range(side):
                for i, item in enumerate(result.objects):
                    row, column = y - item.corner[0], x - item.corner[1]
                    if 0 <= row < item.patch.shape[0] and 0 <= column < item.patch.shape[1]:
                        *colour, alpha = item.patch[row, column].tolist()
                        image[y, x] = (1 - alpha / 255) * image[y, x] + alpha / 255 * np.array(
                            colour
                        )
                        owner[y, x] = i if alpha >= 128 else owner[y, x]
        assert np.abs(result.image - image).max() <= 0.5 + 1e-9
        for i, item in enumerate(result.objects):
            np.testing.assert_array_equal(item.visible, owner == i)


@pytest.mark.parametrize("level", LEVELS)
def test_boxes_are_tight_and_objects_visible_enough(level):
    difficulty = LEVELS[level]
    occluded = 0
    for seed in range(12):
        objects = render_scene(64, difficulty, TRAIN, rng(seed)).objects
        assert 1 <= len(objects) <= difficulty.objects[1]
        for item in objects:
            x0, y0, x1, y1 = item.bbox
            assert item.visible[y0:y1, x0:x1].sum() == item.area == item.visible.sum()
            edges = (item.visible[y0], item.visible[y1 - 1], item.visible[:, x0])
            assert all(edge.any() for edge in (*edges, item.visible[:, x1 - 1]))
            assert min(x1 - x0, y1 - y0) >= 4
            assert item.area >= (1 - difficulty.occlusion) * item.full_area
            occluded += item.area < item.full_area
    assert occluded >= 3


def test_the_size_is_that_of_the_upright_object():
    for size in (0.2, 0.5, 0.9):
        difficulty = Difficulty(objects=(1, 1), size=(size, size), rotation=0.0, occlusion=0.0)
        for seed in range(6):
            (item,) = render_scene(128, difficulty, TRAIN, rng(seed)).objects
            x0, y0, x1, y1 = item.bbox
            assert max(x1 - x0, y1 - y0) == pytest.approx(size * 128, abs=2.5)


def test_rotation_turns_objects():
    """The area remains; the box of a turned object differs."""
    upright, turned = (
        [
            render_scene(
                128, Difficulty(objects=(1, 1), size=(0.5, 0.5), occlusion=0.0, rotation=degrees),
                TRAIN, rng(seed),
            ).objects[0]
            for seed in range(12)
        ]
        for degrees in (0.0, 90.0)
    )  # fmt: skip
    for a, b in zip(upright, turned, strict=True):
        assert a.category == b.category and b.area == pytest.approx(a.area, rel=0.05)
    boxes = [[np.subtract(o.bbox[2:], o.bbox[:2]) for o in items] for items in (upright, turned)]
    assert np.abs(np.subtract(*boxes)).max() > 10


def test_recolouring():
    patch = rng(0).integers(60, 120, (9, 9, 4)).astype(np.uint8)
    luma = patch[..., :3] @ [0.299, 0.587, 0.114]
    np.testing.assert_array_equal(recolour(patch, 0.0, 1.0, 1.0), patch)
    turned = recolour(patch, 90.0, 1.0, 1.0)
    assert np.abs(turned[..., :3] @ [0.299, 0.587, 0.114] - luma).max() <= 0.51
    assert np.abs(turned[..., :3].astype(int) - patch[..., :3]).mean() > 10
    grey = recolour(patch, 30.0, 0.0, 1.0)
    assert np.abs(grey[..., :3] - luma[..., None]).max() <= 0.51
    half = recolour(patch, 0.0, 1.0, 0.5)
    assert np.abs(half[..., :3] - patch[..., :3] / 2).max() <= 0.51
    for changed in (turned, grey, half):
        np.testing.assert_array_equal(changed[..., 3], patch[..., 3])


def test_the_ground_is_made_of_photographs_with_the_contrast_of_the_level():
    assert len(photographs()) == 9
    deviation = {}
    for contrast in (0.5, 1.0):
        difficulty = Difficulty(ground_contrast=(contrast, contrast))
        deviation[contrast] = [
            scene._draw_ground(64, difficulty, rng(seed)).std(axis=(0, 1)) for seed in range(10)
        ]
    np.testing.assert_allclose(deviation[0.5], 0.5 * np.array(deviation[1.0]), rtol=1e-6)
    assert np.mean(deviation[1.0]) > 25


def digest(level: str, split: str) -> str:
    spec = EmojiSpec(split, 3, side=64, seed=1, difficulty=LEVELS[level])
    facts = hashlib.sha256()
    for index in range(3):
        image, objects = spec.draw(index)
        facts.update(image.tobytes() + json.dumps(objects, sort_keys=True).encode())
    return facts.hexdigest()[:16]


def test_a_seed_gives_the_same_scenes_on_every_machine():
    assert {f"{lv}/{sp}": digest(lv, sp) for lv in LEVELS for sp in SPLIT_VENDORS} == DIGESTS


def test_the_same_seed_gives_the_same_files_whatever_the_size_and_workers(tmp_path, monkeypatch):
    few = make_scenes(EmojiSpec("val", 3, side=48), workers=1)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "again"))
    many = make_scenes(EmojiSpec("val", 110, side=48), workers=2)
    for i in range(3):
        name = f"images/{i:06d}.png"
        assert (few / name).read_bytes() == (many / name).read_bytes()
    first, second = (json.loads((d / "annotations.json").read_text()) for d in (few, many))
    assert first["annotations"] == second["annotations"][: len(first["annotations"])]


def test_splits_use_only_their_vendors_and_all_classes():
    seen = {}
    for split in SPLIT_VENDORS:
        coco = COCO(str(make_scenes(EmojiSpec(split, 60, side=48), workers=1) / "annotations.json"))
        annotations = coco.loadAnns(coco.getAnnIds())
        seen[split] = {list(VENDORS)[a["vendor_id"]] for a in annotations}
        assert {a["category_id"] for a in annotations} == set(range(1, 25))
    assert seen == {split: set(vendors) for split, vendors in SPLIT_VENDORS.items()}


def test_the_json_is_coco_with_exact_masks():
    spec = EmojiSpec("train", 6, side=64)
    coco = COCO(str(make_scenes(spec) / "annotations.json"))
    assert [c["name"] for c in coco.loadCats(coco.getCatIds())] == list(CLASSES)
    for index in range(6):
        objects = render_scene(64, spec.difficulty, TRAIN, spec.rng(index)).objects
        annotations = coco.loadAnns(coco.getAnnIds(imgIds=index))
        for item, annotation in zip(objects, annotations, strict=True):
            mask = coco.annToMask(annotation)
            np.testing.assert_array_equal(mask, item.visible)
            ys, xs = np.nonzero(mask)
            box = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert annotation["bbox"] == box and annotation["area"] == mask.sum()
            assert annotation["visible"] == item.area / item.full_area
    results = [{**a, "score": 1.0} for a in coco.loadAnns(coco.getAnnIds())]
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert evaluation.stats[0] == pytest.approx(1)


def test_registered_by_name_and_generated_on_first_use():
    name = emoji("val", 2, side=48, seed=5, level="hard", noise=0.0)
    assert name == emoji("val", 2, side=48, seed=5, level="hard", noise=0.0)
    records = DatasetCatalog.get(name)
    assert len(records) == 2 and records[0]["width"] == 48
    assert {"emoji_unlabeled", "emoji_train", "emoji_val"} <= set(DatasetCatalog.list())
    count = MaskCount.of(records)
    assert count.bitmaps == count.boxes > 0
    annotations = records[0]["annotations"]
    instances = annotations_to_instances(annotations, (48, 48), mask_format="bitmask")
    areas = instances.gt_masks.tensor.sum(dim=(1, 2)).tolist()
    spec = EmojiSpec("val", 2, 48, 5, get_difficulty("hard", noise=0.0))
    assert areas == [item["area"] for item in spec.draw(0)[1]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: emoji("test", 1), "Emoji has no split 'test'"),
        (lambda: emoji("val", 1, level="insane"), "easy, medium, hard"),
        (lambda: emoji("val", 1, colour=3), "colour"),
        (lambda: emoji("val", 0), "size >= 1"),
    ],
)
def test_wrong_names_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_a_missing_photograph_is_named(monkeypatch):
    photographs.cache_clear()
    monkeypatch.setitem(scene.PHOTOGRAPHS, "no.png", "0" * 64)
    with pytest.raises(UserError, match=r"no\.png is missing .* scikit-image"):
        photographs()
    photographs.cache_clear()
