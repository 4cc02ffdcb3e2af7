"""Bits, bands and the limit on pixels."""

import io
import itertools

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from region_pretrain.errors import UserError
from region_pretrain.images import (
    EncodedImage,
    Reading,
    UnreadableImage,
    read_image,
    read_record,
    readings_of,
)


def _random(bands: int, dtype=np.uint8, height: int = 45, width: int = 70) -> np.ndarray:
    values = np.random.default_rng(bands).integers(
        0, np.iinfo(dtype).max + 1, (height, width, bands)
    )
    return values.astype(dtype)


def _tiff(path, values: np.ndarray, planar: str = "contig", **options) -> str:
    """Of grey or RGB with further bands, which are no alpha channel unless options say so."""
    bands = values.shape[2]
    colours = 3 if bands > 2 else 1
    options.setdefault("extrasamples", [0] * (bands - colours))
    options.setdefault("photometric", "rgb" if colours == 3 else "minisblack")
    if bands == 1:
        values = values[..., 0]
    elif planar == "separate":
        values = np.moveaxis(values, 2, 0).copy()
    tifffile.imwrite(path, values, planarconfig=planar if bands > 1 else None, **options)
    return str(path)


def _read(path, **reading) -> np.ndarray:
    return read_record({"file_name": str(path), "reading": reading})


@pytest.mark.parametrize(
    ("bits", "values", "expected"),
    [
        (None, [0, 255, 256, 4095, 65535], [0, 0, 1, 15, 255]),
        (16, [0, 128, 129, 32768, 65535], [0, 0, 1, 128, 255]),
        (12, [0, 8, 9, 2048, 4095], [0, 0, 1, 128, 255]),
        (12, [4094, 4096, 65535, 16, 17], [255, 255, 255, 1, 1]),
        (8, [0, 1, 254, 255, 300], [0, 1, 254, 255, 255]),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tiff"])
@pytest.mark.parametrize("bands", [1, 3])
def test_significant_bits_are_scaled_to_8(tmp_path, suffix, bands, bits, values, expected):
    deep = np.repeat(np.array([values], np.uint16)[..., None], bands, axis=2)
    deep[..., 0] = deep[:, ::-1, -1]
    path = str(tmp_path / f"a.{suffix}")
    cv2.imwrite(path, deep[..., ::-1])
    image = _read(path, bits=bits)
    assert image[0, :, 0].tolist() == expected[::-1]
    assert image[0, :, 2].tolist() == (expected if bands == 3 else expected[::-1])
    assert np.array_equal(_read(path, bits=bits, bands=[1]), image[..., [0, 0, 0]])


def test_8_bit_images_do_not_depend_on_bits(tmp_path):
    picture = _random(3)
    for suffix in ("png", "jpg", "tiff", "bmp"):
        Image.fromarray(picture).save(tmp_path / f"a.{suffix}")
        path = str(tmp_path / f"a.{suffix}")
        assert np.array_equal(_read(path, bits=12), read_image(path))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("bands", [2, 3, 4, 5, 13])
def test_chosen_bands_of_every_kind_of_tiff(tmp_path, dtype, bands):
    values = _random(bands, dtype)
    for planar, (compression, predictor), tile, order, big in itertools.product(
        ("contig", "separate"),
        ((None, False), ("zlib", False), ("zlib", True)),
        (None, (16, 32)),
        "<>",
        (False, True),
    ):
        if big and order == ">":
            continue
        path = _tiff(
            tmp_path / "a.tiff",
            values,
            planar,
            compression=compression,
            predictor=predictor,
            tile=tile,
            byteorder=order,
            bigtiff=big,
        )
        chosen = [bands, 1, 2] if bands > 2 else [2]
        image = _read(path, bands=chosen)
        expected = (values >> 8 if dtype == np.uint16 else values)[..., [b - 1 for b in chosen]]
        kind = (planar, compression, predictor, tile, order, big)
        assert np.array_equal(image, np.broadcast_to(expected, image.shape)), kind
        assert EncodedImage.read(path).size() == (70, 45)


def test_bands_of_other_formats(tmp_path):
    rgba = _random(4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert np.array_equal(_read(tmp_path / "a.png", bands=[3, 2, 1]), rgba[..., [2, 1, 0]])
    assert np.array_equal(_read(tmp_path / "a.png", bands=[4]), rgba[..., [3, 3, 3]])
    Image.fromarray(rgba[..., :3]).save(tmp_path / "b.png")
    assert np.array_equal(_read(tmp_path / "b.png", bands=[3, 1, 2]), rgba[..., [2, 0, 1]])
    Image.fromarray(rgba[..., :3]).save(tmp_path / "a.jpg", quality=95)
    plain = read_image(str(tmp_path / "a.jpg"))
    assert np.array_equal(_read(tmp_path / "a.jpg", bands=[2]), plain[..., [1, 1, 1]])
    for reduce in (1, 2, 4):
        whole = EncodedImage.read(str(tmp_path / "a.jpg"))
        swapped = EncodedImage.read(str(tmp_path / "a.jpg"), None, {"bands": [3, 2, 1]})
        assert np.array_equal(swapped.decode(reduce), whole.decode(reduce)[..., ::-1])
    deep = _random(4, np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep[..., [2, 1, 0, 3]])
    image = _read(tmp_path / "deep.png", bands=[4, 3, 2])
    assert np.array_equal(image, deep[..., [3, 2, 1]] >> 8)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("premultiplied", [False, True])
def test_alpha_of_a_tiff_is_composited_on_white(tmp_path, dtype, premultiplied):
    full = np.iinfo(dtype).max
    rgba = _random(4, dtype)
    rgba[..., 3] |= full // 4
    part = rgba[..., 3:] / full
    stored = rgba.copy()
    if premultiplied:
        stored[..., :3] = np.rint(rgba[..., :3] * part)
    path = _tiff(tmp_path / "a.tiff", stored, extrasamples=[1 if premultiplied else 2])
    expected = (rgba[..., :3] * part / full + 1 - part) * 255
    assert np.abs(read_image(path) - expected).max() <= (3 if premultiplied else 2)
    raw = stored >> 8 if dtype == np.uint16 else stored
    if not premultiplied:
        assert np.array_equal(_read(path, bands=[1, 2, 3]), raw[..., :3])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (_random(4), "a.tiff has 4 bands: choose 1 or 3 of them"),
        (_random(4, np.uint16), "a.tiff has 4 bands: choose 1 or 3 of them"),
        (_random(2), "a.tiff has 2 bands: choose"),
        (_random(8), r"a.tiff has 8 bands: choose .*\?bands=3,2,1 .*&bands=3,2,1$"),
    ],
)
def test_further_bands_need_a_choice(tmp_path, values, message):
    path = _tiff(tmp_path / "a.tiff", values)
    with pytest.raises(UnreadableImage, match=message):
        read_image(path)
    with pytest.raises(UnreadableImage, match="bands: change &bands=9 in the data set's name"):
        _read(path, bands=[9])


def test_a_band_that_does_not_exist_is_refused(tmp_path):
    Image.fromarray(_random(3)).save(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImage, match="a.jpg has 3 bands: change &bands=4,3,2"):
        _read(tmp_path / "a.jpg", bands=[4, 3, 2])
    Image.fromarray(_random(3)[..., 0]).save(tmp_path / "g.png")
    with pytest.raises(UnreadableImage, match="g.png has 1 band: change &bands=1,2,3"):
        _read(tmp_path / "g.png", bands=[1, 2, 3])


def test_white_is_zero(tmp_path):
    deep = _random(1, np.uint16)
    path = _tiff(tmp_path / "a.tiff", deep, photometric="miniswhite")
    assert np.array_equal(read_image(path)[..., 0], (65535 - deep[..., 0]) >> 8)
    path = _tiff(tmp_path / "b.tiff", deep >> 4, photometric="miniswhite")
    expected = np.rint((4095 - (deep[..., 0] >> 4)) * 255.0 / 4095)
    assert np.array_equal(_read(path, bits=12)[..., 0], expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_of_a_tiff_of_many_bands(tmp_path, orientation):
    values = _random(5, np.uint16)
    path = _tiff(tmp_path / "a.tiff", values, extratags=[(274, "H", 1, orientation, True)])
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray((values[..., :3] >> 8).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    image = _read(path, bands=[1, 2, 3])
    assert np.array_equal(image, read_image(str(tmp_path / "a.png")))
    assert EncodedImage.read(path).size() == image.shape[1::-1]


def test_float_tiffs_are_refused_with_a_hint(tmp_path):
    for bands in (1, 3, 4):
        values = np.ones((4, 5, bands), np.float32)
        path = _tiff(tmp_path / "f.tiff", values)
        with pytest.raises(UnreadableImage, match=r"f\.tiff.*convert to 8 bits or to unsigned 16"):
            read_image(path)


def test_a_cut_tiff_of_many_bands_is_unreadable(tmp_path):
    path = _tiff(tmp_path / "a.tiff", _random(5), compression="zlib")
    data = open(path, "rb").read()
    for part in (0.9, 0.5, 0.01):
        open(path, "wb").write(data[: int(len(data) * part)])
        with pytest.raises(UnreadableImage, match="a.tiff"):
            _read(path, bands=[1, 2, 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 17}, "bits=17: must be an integer from 1 to 16"),
        ({"bits": "12"}, "bits=12: must be"),
        ({"bands": [1, 2]}, "bands=1,2: name 1 or 3"),
        ({"bands": [0, 1, 2]}, "counted from 1"),
        ({"gamma": 2}, "reading option gamma"),
    ],
)
def test_invalid_options(options, message):
    with pytest.raises(UserError, match=message):
        Reading.of(options)


def test_reading_options_of_records_as_text():
    assert readings_of([{}, {"reading": {}}, {"reading": None}]) == ""
    reading = {"bands": [4, 3, 2], "bits": 12}
    assert readings_of([{"reading": reading}, {"reading": dict(reading)}]) == "bits=12&bands=4,3,2"
    assert readings_of([{}, {"reading": {"bands": [2]}}]) == "|bands=2"


@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "bmp", "webp", "gif"])
def test_an_image_above_the_limit_is_refused_before_decoding(tmp_path, monkeypatch, suffix):
    path = str(tmp_path / f"big.{suffix}")
    Image.fromarray(_random(3, height=20, width=30)).save(path)
    monkeypatch.setenv("REGION_PRETRAIN_MAX_PIXELS", "600")
    assert read_image(path).shape == (20, 30, 3)
    monkeypatch.setenv("REGION_PRETRAIN_MAX_PIXELS", "599")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    message = rf"big\.{suffix} has 30x20 pixels.*limit of 599.*REGION_PRETRAIN_MAX_PIXELS=600$"
    for function in (
        read_image,
        lambda path: EncodedImage.read(path).size(),
        lambda path: EncodedImage.read(path).check(),
    ):
        with pytest.raises(UnreadableImage, match=message):
            function(path)
    monkeypatch.setenv("REGION_PRETRAIN_MAX_PIXELS", "many")
    with pytest.raises(UserError, match="REGION_PRETRAIN_MAX_PIXELS=many: must be a number"):
        read_image(path)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_the_check_finds_bands_that_do_not_exist(tmp_path, dtype):
    path = str(tmp_path / "a.png")
    cv2.imwrite(path, _random(3, dtype))
    image = EncodedImage.read(path, None, {"bands": [4, 3, 2]})
    for function in (image.check, image.decode):
        with pytest.raises(UnreadableImage, match="has 3 bands: change &bands=4,3,2"):
            function()
    EncodedImage.read(path, None, {"bands": [3, 2, 1]}).check()


def test_the_default_limit_replaces_pillows(tmp_path, monkeypatch):
    """Pillow refuses above 179 megapixels, or twice what it is set to."""
    Image.fromarray(_random(3, height=20, width=30)).save(tmp_path / "a.bmp")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert read_image(str(tmp_path / "a.bmp")).shape == (20, 30, 3)
    assert Image.MAX_IMAGE_PIXELS == 100
    header = io.BytesIO()
    Image.new("1", (1, 1)).save(header, "bmp")
    bomb = bytearray(header.getvalue())
    bomb[18:26] = (20000).to_bytes(4, "little") + (15001).to_bytes(4, "little")
    with pytest.raises(UnreadableImage, match="20000x15001 pixels, more than .* 300000000"):
        EncodedImage(bytes(bomb), "bomb").decode()
