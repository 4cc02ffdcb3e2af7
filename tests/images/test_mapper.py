"""Mappers see the pixels of pre-training, which are Detectron2's for ordinary files."""

import threading

import numpy as np
import pytest
import skimage
from detectron2.data import DatasetMapper, detection_utils
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.images import SamePixels, UnreadableImage, read_image, read_record

PHOTOGRAPH = skimage.data.astronaut()[:203, :301]


def _mapper(image_format: str = "RGB") -> DatasetMapper:
    return DatasetMapper(is_train=False, augmentations=[], image_format=image_format)


def _record(path, image: np.ndarray | None = None, **more) -> dict:
    record = {"file_name": str(path), "image_id": 1, **more}
    if image is not None:
        record |= {"height": image.shape[0], "width": image.shape[1]}
    return record


def _pixels(mapper, record) -> np.ndarray:
    return mapper(record)["image"].numpy().transpose(1, 2, 0)


def _saved(path, mode: str, orientation: int = 1, **options) -> str:
    exif = Image.Exif()
    if orientation > 1:
        exif[0x0112] = orientation
        options["exif"] = exif
    Image.fromarray(PHOTOGRAPH).convert(mode).save(path, **options)
    return str(path)


@pytest.mark.parametrize("image_format", ["RGB", "BGR", "L", "YUV-BT.601"])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_ordinary_files_are_detectron2s_pixels(tmp_path, suffix, image_format):
    modes = ("RGB", "L", "P", "1") if suffix == "png" else ("RGB", "L", "CMYK")
    for mode in modes:
        path = _saved(tmp_path / f"{mode}.{suffix}", mode)
        theirs = detection_utils.read_image(path, image_format)
        ours = _pixels(SamePixels(_mapper(image_format)), _record(path))
        assert ours.dtype == theirs.dtype and np.array_equal(ours, theirs), mode
        assert np.array_equal(read_record(_record(path), image_format), theirs)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_turned_files_are_detectron2s_pixels(tmp_path, suffix, orientation):
    for mode in ("RGB", "L"):
        path = _saved(tmp_path / f"a.{suffix}", mode, orientation)
        theirs = detection_utils.read_image(path, "BGR")
        assert np.array_equal(_pixels(SamePixels(_mapper("BGR")), _record(path, theirs)), theirs)


@pytest.mark.parametrize("quality", [40, 87, 100])
@pytest.mark.parametrize("subsampling", [0, 1, 2])
def test_jpegs_of_all_kinds_are_detectron2s_pixels(tmp_path, quality, subsampling):
    for progressive in (False, True):
        options = {"quality": quality, "subsampling": subsampling, "progressive": progressive}
        path = _saved(tmp_path / "a.jpg", "RGB", **options)
        assert np.array_equal(read_image(path), detection_utils.read_image(path, "RGB"))


def test_16_bits_and_bands_are_those_of_pre_training(tmp_path):
    grey = (PHOTOGRAPH[..., 0].astype(np.uint16) * 16) + 3
    path = str(tmp_path / "deep.png")
    Image.fromarray(grey).save(path)
    assert np.median(detection_utils.read_image(path, "RGB")) == 255  # Pillow clips
    for reading in ({}, {"bits": 12}, {"bits": 12, "bands": [1, 1, 1]}):
        record = _record(path, grey, reading=reading)
        expected = read_record(record)
        assert expected.mean() == pytest.approx(
            np.rint(grey * 255.0 / 4095).mean() if reading else (grey >> 8).mean()
        )
        for _ in range(2):  # the record is unchanged
            assert np.array_equal(_pixels(SamePixels(_mapper("BGR")), record), expected[..., ::-1])


def test_other_files_and_other_callers_get_detectron2s_reader(tmp_path):
    path = str(tmp_path / "deep.png")
    Image.fromarray(np.full((4, 4), 4095, np.uint16)).save(path)
    classes = np.arange(16, dtype=np.uint8).reshape(4, 4)
    Image.fromarray(classes).save(tmp_path / "classes.png", transparency=3)
    record = _record(path, classes, reading={"bits": 12, "bands": [1]})
    record["sem_seg_file_name"] = str(tmp_path / "classes.png")
    seen = {}

    def mapper(record):
        thread = threading.Thread(
            target=lambda: seen.update(thread=detection_utils.read_image(path, "RGB"))
        )
        thread.start()
        thread.join()
        return {**DatasetMapper(is_train=True, augmentations=[], image_format="RGB")(record)}

    mapped = SamePixels(mapper)(record)
    assert mapped["sem_seg"].tolist() == classes.tolist()
    assert (mapped["image"] == 255).all()
    stock = np.asarray(Image.open(path).convert("RGB"))
    assert np.array_equal(seen["thread"], stock)
    assert np.array_equal(detection_utils.read_image(path, format="RGB"), stock)


def test_a_reader_that_the_user_put_in_its_place_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(
        detection_utils, "read_image", lambda file_name, format: np.full((2, 2, 3), 7, np.uint8)
    )
    assert (_pixels(SamePixels(_mapper()), _record("nowhere.png")) == 7).all()


@pytest.mark.parametrize("how", ["detectron2", "pillow"])
def test_a_broken_image_is_named(tmp_path, how):
    path = _saved(tmp_path / "cut.jpg", "RGB")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    mapper = _mapper() if how == "detectron2" else lambda r: np.asarray(Image.open(r["file_name"]))
    with pytest.raises(UnreadableImage, match=r"cut\.jpg"):
        SamePixels(mapper)(_record(path))


def test_a_size_that_contradicts_the_file_is_named_with_both_sizes(tmp_path):
    path = _saved(tmp_path / "turned.jpg", "RGB", 6)
    with pytest.raises(
        UserError,
        match=r"turned\.jpg is 203x301, but its annotations are for 301x203: .*EXIF orientation",
    ) as caught:
        SamePixels(_mapper())(_record(path, PHOTOGRAPH))
    assert not isinstance(caught.value, UnreadableImage)  # not skipped
    path = _saved(tmp_path / "other.jpg", "RGB")
    record = {**_record(path), "width": 30, "height": 20}
    with pytest.raises(UserError, match=r"other\.jpg is 301x203.* for 30x20: correct its width"):
        SamePixels(_mapper())(record)
