"""Every kind of image file; the reference is Pillow, called step by step."""

import io
import struct
import zlib

import cv2
import numpy as np
import pytest
import skimage
from picture_files import oriented, png, save, smooth
from PIL import Image, ImageOps

from region_pretrain.data.geometry import ViewGeometry, decode_reduction, map_points, render
from region_pretrain.errors import UserError
from region_pretrain.images import EncodedImage, UnreadableImage, read_image


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "webp", "ppm"])
def test_lossless_rgb_is_kept_exactly(tmp_path, check_size, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(smooth()), **options)
    image = read_image(path)
    assert np.array_equal(image, smooth())
    check_size(path, image)


def test_jpeg_has_the_colours_in_rgb_order(tmp_path, check_size):
    path = save(tmp_path / "a.jpg", Image.fromarray(smooth()), quality=95)
    image = read_image(path)
    assert np.abs(image.astype(int) - smooth()).max() <= 12  # chroma is subsampled
    assert np.abs(image.astype(int) - np.asarray(Image.open(path))).max() <= 2
    check_size(path, image)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_grey_becomes_three_equal_channels(tmp_path, check_size, suffix):
    grey = smooth()[..., 0]
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(grey))
    image = read_image(path)
    assert np.abs(image.astype(int) - grey[..., None]).max() <= (2 if suffix == "jpg" else 0)
    assert (image == image[..., :1]).all()
    check_size(path, image)


def test_transparency_is_composited_on_white(tmp_path, check_size):
    rgb, alpha = smooth(), smooth()[::-1, ::-1, 0]
    part = alpha[..., None] / 255.0
    expected = rgb * part + 255 * (1 - part)
    path = save(tmp_path / "rgba.png", Image.fromarray(np.dstack([rgb, alpha])))
    assert np.abs(read_image(path) - expected).max() <= 1
    check_size(path, read_image(path))

    path = save(tmp_path / "la.png", Image.fromarray(np.dstack([rgb[..., 0], alpha]), "LA"))
    expected = rgb[..., :1] * part + 255 * (1 - part)
    assert np.abs(read_image(path) - expected).max() <= 1
    check_size(path, read_image(path))


def test_transparent_palette_entry_and_colour_key_are_white(tmp_path):
    index = np.array([[0, 1, 2], [2, 1, 0]], np.uint8)
    image = Image.fromarray(index, "P")
    image.putpalette([10, 20, 30, 200, 0, 0, 0, 0, 250])
    expected = np.array([[10, 20, 30], [255, 255, 255], [0, 0, 250]], np.uint8)[index]
    assert np.array_equal(read_image(save(tmp_path / "p.png", image, transparency=1)), expected)
    assert np.array_equal(read_image(save(tmp_path / "p.gif", image, transparency=1)), expected)
    opaque = np.array([[10, 20, 30], [200, 0, 0], [0, 0, 250]], np.uint8)[index]
    assert np.array_equal(read_image(save(tmp_path / "opaque.png", image)), opaque)

    keyed = Image.fromarray(opaque)
    path = save(tmp_path / "key.png", keyed, transparency=(200, 0, 0))
    assert np.array_equal(read_image(path), expected)


def test_one_bit_image_is_black_and_white(tmp_path, check_size):
    bits = smooth()[..., 0] > 100
    path = save(tmp_path / "a.png", Image.fromarray(bits))
    image = read_image(path)
    assert np.array_equal(image, np.repeat(bits[..., None] * np.uint8(255), 3, 2))
    check_size(path, image)


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path, check_size):
    deep = (np.arange(23 * 37).reshape(23, 37) * 77).astype(np.uint16)
    for suffix in ("png", "tiff"):
        path = save(tmp_path / f"a.{suffix}", Image.fromarray(deep))
        image = read_image(path)
        assert np.abs(image - deep[..., None] / 257.0).max() <= 1
        check_size(path, image)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("bits", [None, 12])
def test_sixteen_bit_png_with_a_transparent_colour(tmp_path, check_size, channels, bits):
    """As GDAL marks pixels without data; Pillow reads the upper bytes of such RGB files."""
    deep = np.random.default_rng(0).integers(0, 4096, (5, 7, channels)).astype(">u2")
    deep[1, 2], deep[3, 4] = 77, 77
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    key = (b"tRNS", np.full(channels, 77, ">u2").tobytes())
    path = tmp_path / "a.png"
    path.write_bytes(png(7, 5, 16, {1: 0, 3: 2}[channels], rows, [key]))
    expected = np.round(deep * 255.0 / 4095) if bits else deep >> 8
    expected = np.broadcast_to(expected, (5, 7, 3)).copy()
    expected[1, 2] = expected[3, 4] = 255
    image = EncodedImage.read(str(path), None, {"bits": bits} if bits else None).decode()
    assert (image == expected).all()
    check_size(str(path), image)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_colour_and_alpha_png(tmp_path, check_size, colour, channels):
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (5, 7, channels)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in deep)
    path = tmp_path / "a.png"
    path.write_bytes(png(7, 5, 16, colour, rows))
    values = deep / 257.0
    if channels in (2, 4):
        part = values[..., -1:] / 255
        values = values[..., :-1] * part + 255 * (1 - part)
    image = read_image(str(path))
    assert np.abs(image - values).max() <= 2
    check_size(str(path), image)


def test_float_and_32_bit_images_are_refused(tmp_path):
    small = np.full((4, 4), 200, np.int32)  # a data set's files are all refused or all read
    for array in (np.ones((4, 4), np.float32), np.full((4, 4), 70000, np.int32), small):
        path = save(tmp_path / "deep.tiff", Image.fromarray(array))
        with pytest.raises(UnreadableImage, match=r"deep\.tiff.*convert to 8 bits"):
            read_image(path)


def test_cmyk_jpeg(tmp_path, check_size):
    """Adobe's CMYK is stored inverted; a red picture must come out red."""
    cmyk = Image.fromarray(smooth()).convert("CMYK")
    path = save(tmp_path / "a.jpg", cmyk, quality=95)
    image = read_image(path)
    assert np.abs(image.astype(int) - smooth()).max() <= 16
    check_size(path, image)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_exif_orientation_of_a_jpeg(tmp_path, check_size, orientation, mode):
    picture = Image.fromarray(smooth()).convert(mode)
    path = save(tmp_path / "a.jpg", picture, exif=oriented(orientation), quality=95)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)).convert("RGB")).astype(int)
    image = read_image(path)
    assert image.shape == ((37, 23, 3) if orientation >= 5 else (23, 37, 3))
    assert np.abs(image - expected).max() <= 3
    check_size(path, image)


def test_orientation_6_puts_the_stored_left_edge_on_top(tmp_path):
    """A camera held upright: checks one value without Pillow."""
    stored = np.zeros((4, 6, 3), np.uint8)
    stored[:, 0] = (255, 0, 0)  # left edge red
    stored[0, 1:] = (0, 0, 255)  # top edge blue
    path = save(tmp_path / "a.png", Image.fromarray(stored), exif=oriented(6))
    image = read_image(path)
    assert image.shape == (6, 4, 3)
    assert (image[0] == (255, 0, 0)).all()  # stored left -> top
    assert (image[1:, -1] == (0, 0, 255)).all()  # stored top -> right


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", [3, 5, 8])
def test_exif_orientation_of_other_formats(tmp_path, check_size, suffix, orientation):
    options = {"lossless": True} if suffix == "webp" else {}
    image = Image.fromarray(smooth())
    path = save(tmp_path / f"a.{suffix}", image, exif=oriented(orientation), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(path)))
    assert np.array_equal(read_image(path), expected)
    check_size(path, read_image(path))


def test_orientation_after_the_pixels_of_a_png_counts(tmp_path, check_size):
    data = png(3, 2, 8, 0, b"\0\1\2\3\0\4\5\6")
    end = data.rindex(b"IEND") - 4
    block = b"MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    exif = struct.pack(">I", len(block)) + b"eXIf" + block
    exif += struct.pack(">I", zlib.crc32(exif[4:]))
    path = tmp_path / "a.png"
    path.write_bytes(data[:end] + exif + data[end:])
    image = read_image(str(path))
    assert image[..., 0].tolist() == [[4, 1], [5, 2], [6, 3]]
    check_size(str(path), image)


@pytest.mark.parametrize("value", [0, 9, 77])
def test_senseless_orientation_is_ignored(tmp_path, check_size, value):
    path = save(tmp_path / "a.jpg", Image.fromarray(smooth()), exif=oriented(value))
    assert read_image(path).shape == (23, 37, 3)
    check_size(path, read_image(path))


def test_damaged_exif_is_ignored(tmp_path, check_size):
    exif = b"Exif\0\0MM\0*\xff\xff\xff\xff\xff\xff"
    path = save(tmp_path / "a.jpg", Image.fromarray(smooth()), exif=exif)
    assert read_image(path).shape == (23, 37, 3)
    check_size(path, read_image(path))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "1"])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_damaged_exif_of_other_kinds_is_ignored(tmp_path, check_size, suffix, mode):
    picture = Image.fromarray(smooth()).convert(mode)
    plain = save(tmp_path / f"plain.{suffix}", picture, lossless=True)
    path = save(tmp_path / f"a.{suffix}", picture, lossless=True, exif=b"Exif\0\0junk")
    assert (read_image(path) == read_image(plain)).all()
    check_size(path, read_image(path))


@pytest.mark.parametrize("reduce", [2, 4, 8])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_decoding_equals_downscaling(tmp_path, reduce, suffix, orientation):
    noise = np.random.default_rng(0).integers(0, 256, (301, 203, 3), np.uint8)
    picture, tolerance = (smooth(301, 203), 8) if suffix == "jpg" else (noise, 1)
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(picture), exif=oriented(orientation))
    full, small = read_image(path), EncodedImage.read(path).decode(reduce)
    height, width = full.shape[:2]
    assert small.shape == (-(-height // reduce), -(-width // reduce), 3)
    expected = cv2.resize(full, small.shape[1::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(small.astype(int) - expected).max() <= tolerance


def test_reduce_must_be_a_power_of_two(tmp_path):
    path = save(tmp_path / "a.png", Image.fromarray(smooth()))
    with pytest.raises(ValueError, match="reduce"):
        EncodedImage.read(path).decode(3)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff", "gif"])
def test_truncated_file_is_unreadable(tmp_path, suffix):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 255, (80, 90, 3)).astype(np.uint8)
    Image.fromarray(noise).save(buffer, {"jpg": "jpeg"}.get(suffix, suffix))
    path = tmp_path / f"cut.{suffix}"
    for part in (0.9, 0.5, 0.02):
        path.write_bytes(buffer.getvalue()[: int(len(buffer.getvalue()) * part)])
        with pytest.raises(UnreadableImage, match=rf"cut\.{suffix}"):
            read_image(str(path))


def test_jpeg_cut_after_its_exif_thumbnail_is_unreadable(tmp_path):
    """The thumbnail has its own end marker, which must not be mistaken for the image's."""
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "jpeg")
    thumbnail = b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0" + buffer.getvalue()
    path = save(tmp_path / "a.jpg", Image.fromarray(smooth(300, 200)), exif=thumbnail)
    data = (tmp_path / "a.jpg").read_bytes()
    assert data.count(b"\xff\xd9") == 2
    (tmp_path / "a.jpg").write_bytes(data[: len(data) * 7 // 10])
    with pytest.raises(UnreadableImage):
        read_image(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty"), (b"no image at all", "not an image"), (b"\xff\xd8", "not an image")],
)
def test_a_file_that_is_not_an_image_is_reported_with_the_reason(tmp_path, content, reason):
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    for function in (read_image, lambda path: EncodedImage.read(path).size()):
        with pytest.raises(UnreadableImage, match=rf"x\.jpg: .*{reason}") as caught:
            function(str(path))
        assert isinstance(caught.value, UserError)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(UnreadableImage, match="gone.jpg: no such file"):
        read_image(str(tmp_path / "gone.jpg"))
    with pytest.raises(UnreadableImage, match="cannot be read"):
        read_image(str(tmp_path))


def test_an_image_in_memory_is_named_in_the_error():
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "png")
    assert np.array_equal(EncodedImage(buffer.getvalue(), "memory").decode(), smooth())
    with pytest.raises(UnreadableImage, match="archive.tar:3"):
        EncodedImage(b"junk", "archive.tar:3").decode()


def test_size_of_a_jpeg_with_a_long_header(tmp_path, check_size):
    profile = np.random.default_rng(0).bytes(150_000)  # spread over three segments
    path = save(
        tmp_path / "a.jpg", Image.fromarray(smooth()), icc_profile=profile, exif=oriented(6)
    )
    image = read_image(path)
    assert image.shape == (37, 23, 3)
    check_size(path, image)


@pytest.mark.parametrize("name", ["astronaut", "coffee", "chelsea", "rocket"])
def test_photographs_as_scikit_image_reads_them(name):
    expected = getattr(skimage.data, name)()
    suffix = "jpg" if name == "rocket" else "png"
    folder = skimage.__path__[0]
    image = read_image(f"{folder}/data/{name}.{suffix}")
    assert np.abs(image.astype(int) - expected).max() <= (2 if suffix == "jpg" else 0)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("progressive", [False, True])
def test_both_jpeg_decoders_give_the_same_pixels(monkeypatch, subsampling, mode, progressive):
    simplejpeg = pytest.importorskip("simplejpeg")
    used = []
    decode_jpeg = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda x: used.append(1) or decode_jpeg(x))
    for photograph in (skimage.data.astronaut()[:203, :301], skimage.data.coffee()[3:400, :255]):
        image = Image.fromarray(photograph).convert(mode)
        buffer = io.BytesIO()
        image.save(buffer, "jpeg", quality=87, subsampling=subsampling, progressive=progressive)
        data = np.frombuffer(buffer.getvalue(), np.uint8)
        expected = cv2.imdecode(data, cv2.IMREAD_COLOR)[:, :, ::-1]
        assert np.array_equal(EncodedImage(buffer.getvalue(), "memory").decode(), expected)
        with monkeypatch.context() as patch:
            patch.setattr("region_pretrain.images.decoding.simplejpeg", None)
            assert np.array_equal(EncodedImage(buffer.getvalue(), "memory").decode(), expected)
    assert len(used) == 2


def test_a_jpeg_with_minor_damage_is_decoded_as_opencv_does():
    buffer = io.BytesIO()
    Image.fromarray(skimage.data.astronaut()).save(buffer, "jpeg", quality=87)
    data = bytearray(buffer.getvalue())
    middle = len(data) // 2
    data[middle : middle + 40] = b"\x55\xff\xd3" + bytes(37)  # a marker out of place
    expected = cv2.imdecode(np.frombuffer(bytes(data), np.uint8), cv2.IMREAD_COLOR)[:, :, ::-1]
    found = EncodedImage(bytes(data), "memory").decode()
    assert np.array_equal(found, expected)
    clean = skimage.data.astronaut()[:200].astype(int)
    assert np.abs(found[:200] - clean).mean() < 4  # the rows before the damage


@pytest.mark.parametrize("orientation", range(1, 9))
def test_views_of_reduced_images_show_what_their_boxes_are(tmp_path, orientation):
    """No factor divides 1,009, and the padding of a turned image is on another side."""
    edge, side = 500, 1009
    upright = np.zeros((side, side, 3), np.uint8)
    upright[:, edge:] = 255
    path, stored = tmp_path / "a.jpg", Image.fromarray(upright)
    if orientation > 1:  # the turn that undoes the orientation's
        turn = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]
        stored = stored.transpose(Image.Transpose(turn))
    exif = Image.Exif()
    exif[0x112] = orientation
    stored.save(path, quality=100, subsampling=0, exif=exif)
    assert np.array_equal(
        np.asarray(ImageOps.exif_transpose(Image.open(path)))[:, 490:510] > 99,
        upright[:, 490:510] > 99,
    )
    image, geometry = EncodedImage.read(str(path)), ViewGeometry(0, 0, side, side, (63, 63))
    reduce = image.reduction(decode_reduction([geometry]))
    assert reduce == (8 if orientation == 1 else 1)
    view = render(image.decode(reduce), geometry, np.zeros((63, 63, 3), np.uint8), True, reduce)
    expected = map_points(geometry.affine, np.array([[edge, 0.0]]))[0, 0]
    assert 63 - view[30, :, 0].sum() / 255 == pytest.approx(expected, abs=0.25)


@pytest.mark.parametrize("crop", [(0, 0, 80, 60), (-5, 0, 20, 20), (50, 50, 60, 60), (9, 9, 9, 20)])
def test_a_crop_must_be_within_its_image(tmp_path, crop):
    Image.new("RGB", (40, 30)).save(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a.png: crop=.* is not within its 40 x 30 pixels"):
        EncodedImage.read(str(tmp_path / "a.png"), crop).decode()
    assert EncodedImage.read(str(tmp_path / "a.png"), (1, 2, 40, 30)).decode().shape == (28, 39, 3)
