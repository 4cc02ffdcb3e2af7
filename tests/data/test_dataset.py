"""Images, regions and views; mismatches are refused before training."""

import logging

import cv2
import numpy as np
import pytest
import torch

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.geometry import ViewGeometry, boxes_in_view, decode_reduction
from region_pretrain.data.photometry import Photometry
from region_pretrain.data.views import ViewSample, ViewSampler
from region_pretrain.errors import UserError
from region_pretrain.regions.generate import make_regions


def test_regions_are_found_by_key(region_folder, soco_views):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    for index in range(len(data)):
        image, size, boxes, _ = data.read(index)
        expected = region_folder.boxes[data._records[index][1]]
        np.testing.assert_array_equal(boxes, expected)
        assert size == (64, 64) and image.decode().shape == (64, 64, 3)


def test_ids_of_two_data_sets_may_be_equal_where_no_regions_are_looked_up(tmp_path, soco_views):
    names = [f"folder://{tmp_path / name}" for name in ("a", "b")]
    for value, name in enumerate("ab"):
        (tmp_path / name).mkdir()
        cv2.imwrite(str(tmp_path / name / "0.png"), np.full((64, 64, 3), value, np.uint8))
    data = PretrainDataset(names, soco_views)
    assert [data.read(i).encoded.decode().max() for i in range(len(data))] == [0, 1]
    with pytest.raises(UserError, match="image '0.png' is in .*/a' and .*/b'"):
        PretrainDataset(names, soco_views, str(tmp_path / "regions.arrow"))


def test_another_recipe_is_refused(region_folder, soco_views):
    with pytest.raises(UserError, match="'shapes-v1'.*'soco-v1'"):
        PretrainDataset(
            f"folder://{region_folder.images}", soco_views, region_folder.store, recipe="soco-v1"
        )


def test_a_store_of_other_images_is_refused(region_folder, soco_views, tmp_path):
    (tmp_path / "others").mkdir()
    cv2.imwrite(str(tmp_path / "others" / "other.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="1 of the 1 images"):
        PretrainDataset(f"folder://{tmp_path / 'others'}", soco_views, region_folder.store)


def write_frames(folder, seed, count=6):
    """PNG files of equal names and equal size in pixels, but not in bytes."""
    folder.mkdir(exist_ok=True)
    for i in range(count):
        noise = np.random.default_rng([seed, i]).integers(0, 40 + 20 * seed, (64, 64, 3))
        cv2.imwrite(str(folder / f"{i:06d}.png"), noise.astype(np.uint8))
    return f"folder://{folder}"


def test_a_store_of_other_files_with_the_same_keys_is_refused(tmp_path, soco_views, caplog):
    mine, others = (write_frames(tmp_path / f"vid{n}", n) for n in (1, 2))
    out = str(tmp_path / "vid1.arrow")
    make_regions(get_records(mine), out, "grid-v1", workers=1)
    PretrainDataset(mine, soco_views, out)
    with pytest.raises(
        UserError, match=r"vid1.arrow .*vid2.*: 6 of 6 .*'000000.png' had \d+ bytes and has \d+"
    ):
        PretrainDataset(others, soco_views, out)
    assert "differ in size" not in caplog.text
    PretrainDataset(others, soco_views, out, allow_changed_files=True)
    assert "6 of 6 compared files differ in size" in caplog.text


def test_a_few_replaced_files_are_named_and_missing_ones_not_compared(
    tmp_path, soco_views, caplog, monkeypatch
):
    name, out = write_frames(tmp_path / "vid", 1), str(tmp_path / "vid.arrow")
    records = get_records(name)
    make_regions(records, out, "grid-v1", workers=1)
    write_frames(tmp_path / "vid", 2, count=2)
    (tmp_path / "vid/000005.png").unlink()
    monkeypatch.setattr("region_pretrain.data.dataset.get_records", lambda *_, **__: records)
    assert len(PretrainDataset(name, soco_views, out)) == 6
    assert "2 of 5 compared files differ in size" in caplog.text
    caplog.clear()
    for record in records:
        (tmp_path / "vid" / record["image_id"]).unlink(missing_ok=True)
    PretrainDataset(name, soco_views, out)  # nothing to compare
    assert "differ in size" not in caplog.text


def test_a_few_missing_images_are_tolerated_and_listed(region_folder, soco_views, caplog):
    cv2.imwrite(str(region_folder.images / "late.png"), np.zeros((64, 64, 3), np.uint8))
    arguments = (f"folder://{region_folder.images}", soco_views, region_folder.store)
    with pytest.raises(UserError, match="late.png"):
        PretrainDataset(*arguments, max_unreadable=0.01)
    with caplog.at_level(logging.WARNING):
        data = PretrainDataset(*arguments, max_unreadable=0.2)
    assert len(data) == len(region_folder.boxes) and "late.png" in caplog.text


def test_what_region_search_accepted_as_unreadable_is_accepted(tmp_path, soco_views, caplog):
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(8):
        cv2.imwrite(str(folder / f"{i}.png"), np.full((64, 64, 3), 20 * i, np.uint8))
    (folder / "3.png").write_bytes(b"broken")
    out = str(tmp_path / "regions.arrow")
    summary = make_regions(get_records(f"folder://{folder}"), out, "grid-v1", workers=1)
    assert (summary["images"], summary["unreadable"]) == (7, 1)  # one is always tolerated
    data = PretrainDataset(f"folder://{folder}", soco_views, out)
    assert len(data) == 7 and "3.png" in caplog.text
    cv2.imwrite(str(folder / "late.png"), np.zeros((64, 64, 3), np.uint8))
    with pytest.raises(UserError, match="no regions for 2 of the 9 images"):
        PretrainDataset(f"folder://{folder}", soco_views, out)


def test_an_image_of_another_size_than_its_regions_is_refused(region_folder, soco_views):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    cv2.imwrite(data._records[0][0], np.zeros((32, 64, 3), np.uint8))
    with pytest.raises(UserError, match="64x32.*64x64"):
        data.sample(0, 0, 0)


def test_a_file_broken_during_the_run_is_replaced_by_the_next(region_folder, soco_views, caplog):
    data = PretrainDataset(f"folder://{region_folder.images}", soco_views, region_folder.store)
    expected = data.read(3)[0].decode()
    with open(data._records[2][0], "wb") as f:
        f.write(b"not an image")
    with caplog.at_level(logging.WARNING):
        image = data.sample(0, 0, 2).image
    np.testing.assert_array_equal(image, expected)
    assert data._records[2][0] in caplog.text


def test_images_without_regions_are_counted(region_folder, soco_views, caplog):
    thin = np.zeros((6, 64, 3), np.uint8)  # no region can be 10 pixels high
    cv2.imwrite(str(region_folder.images / "thin.png"), thin)
    names = f"folder://{region_folder.images}"
    store = region_folder.store + ".new"
    make_regions(get_records(names), store, "shapes-v1", workers=1)
    with caplog.at_level(logging.INFO):
        data = PretrainDataset(names, soco_views, store)
    assert len(data) == 13 and len(data.read(12)[2]) == 0
    assert "1 images without regions" in caplog.text


class _Crop(ViewSampler):
    """One view of 32 pixels: the same crop of every image."""

    def __init__(self, *crop: int) -> None:
        self.geometry = ViewGeometry(*crop, size=(32, 32))

    def __call__(self, width, height, boxes, rng) -> list[ViewSample]:
        box = boxes_in_view(self.geometry, np.array([self.geometry.crop_box]))
        ids = np.zeros(1, np.int64)
        return [ViewSample(self.geometry, Photometry(), box, ids, np.ones(1, bool))]


class _Growing(_Crop):
    """Breaks the rule that all images have the same views."""

    def __init__(self, what: str) -> None:
        super().__init__(0, 0, 64, 64)
        self.what, self.calls = what, 0

    def __call__(self, width, height, boxes, rng) -> list[ViewSample]:
        self.calls += 1
        (view,) = super().__call__(width, height, boxes, rng)
        if self.what == "views":
            return [view] * self.calls
        if self.what == "size":
            view.geometry = ViewGeometry(0, 0, 64, 64, size=(32, 31 + self.calls))
        else:
            view.boxes = np.zeros((self.calls, 4), np.float32)
        return [view]


@pytest.mark.parametrize(
    ("what", "second"),
    [
        ("views", "[((32, 32), 1), ((32, 32), 1)]"),
        ("size", "[((32, 33), 1)]"),
        ("slots", "[((32, 32), 2)]"),
    ],
)
def test_a_sampler_whose_images_have_different_views_is_told_so(region_folder, what, second):
    data = PretrainDataset(f"folder://{region_folder.images}", _Growing(what))
    with pytest.raises(UserError) as error:
        data.batch(0, 0, [0, 1])
    text = f"region slots): [((32, 32), 1)] and {second}; they must be the same: pad the boxes"
    assert text in str(error.value)


class _Returning(_Crop):
    """Returns something else than a list of views, from one of its hooks."""

    def __init__(self, hook: str, value: object) -> None:
        super().__init__(0, 0, 64, 64)
        self.hook, self.value = hook, value

    def __call__(self, width, height, boxes, rng) -> list[ViewSample]:
        views = super().__call__(width, height, boxes, rng)
        return self.value if self.hook == "__call__" else views

    def complete(self, views, image, size, rng) -> list[ViewSample]:
        return self.value if self.hook == "complete" else views


@pytest.mark.parametrize("hook", ["__call__", "complete"])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "a NoneType"),
        ([np.zeros((32, 32, 3))], "a list with a ndarray"),
        ([], "an empty list"),
        (iter(()), "a tuple_iterator"),
    ],
)
def test_a_sampler_that_returns_no_views_is_named(region_folder, hook, value, named):
    data = PretrainDataset(f"folder://{region_folder.images}", _Returning(hook, value))
    with pytest.raises(UserError) as error:
        data.batch(0, 0, [0, 1])
    assert str(error.value) == (
        f"_Returning.{hook} of the view sampler returns {named}: return a list of ViewSample, one "
        "for each view"
    )


@pytest.mark.parametrize(
    "side, reduce, suffix",
    [(64, 1, "jpg"), (127, 1, "jpg"), (128, 2, "jpg"), (300, 4, "jpg"), (520, 8, "jpg")]
    + [(520, 1, "png")],
)
def test_a_large_jpeg_is_decoded_at_a_reduced_size(tmp_path, side, reduce, suffix):
    ramp = np.add.outer(np.arange(600) * 0.15, np.arange(601) * 0.25)
    image = np.repeat(ramp.astype(np.uint8)[..., None], 3, axis=2)
    cv2.imwrite(str(tmp_path / f"a.{suffix}"), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    data = PretrainDataset(f"folder://{tmp_path}", _Crop(33, 47, side, side))
    sample = data.sample(0, 0, 0)
    assert sample.reduce == reduce
    assert sample.image.shape[:2] == (-(-600 // reduce), -(-601 // reduce))
    view = data.batch(0, 0, [0]).views[0].images[0, 0].numpy().astype(float)
    # The ramp at the centre of each of the view's pixels: a quarter of one is 0.4 * step / 4.
    centers = (np.arange(32) + 0.5) * side / 32 - 0.5
    exact = np.add.outer(0.15 * (47 + centers), 0.25 * (33 + centers))
    assert np.abs(view - exact).max() < 1.5 + 0.1 * side / 32


def test_reduction_is_the_largest_that_keeps_twice_the_size_of_each_view():
    def view(side: int, size: int) -> ViewGeometry:
        return ViewGeometry(0, 0, side, 2 * side, (size, size))

    for side in range(224, 4000, 7):
        expected = max(r for r in (1, 2, 4, 8) if r == 1 or side / r / 224 >= 2)
        assert decode_reduction([view(side, 224), view(side, 112)]) == expected


def test_a_batch_read_in_several_parts_equals_one_read_at_once(pretrain_dataset, monkeypatch):
    """Files are read 64 at a time; recipes have 128 images per process."""
    whole = pretrain_dataset.batch(0, 0, range(12))
    monkeypatch.setattr("region_pretrain.data.dataset._FILES_IN_MEMORY", 5)
    parts = pretrain_dataset.batch(0, 0, range(12))
    for one, other in zip(whole.views, parts.views, strict=True):
        for name, value in vars(one).items():
            assert torch.equal(getattr(other, name), value), name
    assert torch.equal(whole.indices, parts.indices)


def test_each_sample_has_a_generator_of_its_own(pretrain_dataset):
    drawn = pretrain_dataset.draw(3, 2, [0, 5])
    seeds = [d.rng.bit_generator.seed_seq.entropy for d in drawn]
    assert seeds == [[3, 2, 1], [3, 2, 6]]  # [3, 2, 0] orders the epoch
