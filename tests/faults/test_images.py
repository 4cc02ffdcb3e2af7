"""Odd files in a folder of images: none of them stops, fills or ends a run."""

import os
import signal
import struct
import subprocess
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFile

from region_pretrain.data.catalog import get_records
from region_pretrain.data.dataset import PretrainDataset
from region_pretrain.data.folder import load_image_folder
from region_pretrain.errors import UserError
from region_pretrain.images import UnreadableImage, read_image
from region_pretrain.images.encoded import EncodedImage
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions


@pytest.fixture(autouse=True)
def _not_for_ever():
    """Reading a pipe would wait for its writer."""

    def late(*args):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def paint(path, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (48, 48, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def odd(tmp_path):
    """Two images, one of them with a newline in its name, among everything that is none."""
    root = tmp_path / "photos"
    (root / "sub").mkdir(parents=True)
    paint(root / "sub" / "b.png", 1)
    paint(root / "a\nb.png", 2)
    os.mkfifo(root / "pipe.jpg")
    (root / "zero.png").symlink_to("/dev/zero")
    (root / "itself.jpg").symlink_to("itself.jpg")
    (root / "one").symlink_to("two")
    (root / "two").symlink_to("one")
    raw = os.fsencode(root)
    open(os.path.join(raw, b"caf\xe9.jpg"), "wb").close()
    os.mkdir(os.path.join(raw, b"\xff"))
    open(os.path.join(raw, b"\xff", b"c.png"), "wb").close()
    (root / "link.png").symlink_to("sub/b.png")
    return root


def test_only_regular_files_count_and_the_rest_is_listed(odd, caplog):
    keys = [record["image_id"] for record in load_image_folder(str(odd))]
    assert keys == ["a\nb.png", "link.png", "sub/b.png"]
    (warning,) = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    assert "\n" not in warning and "skipped 7: " in warning
    for entry in (
        "pipe.jpg: not a regular file",
        "zero.png: not a regular file",
        "itself.jpg: Too many levels of symbolic links",
        "one: Too many levels of symbolic links",
        r"caf\udce9.jpg: its name is not UTF-8",
        r"\udcff: its name is not UTF-8",
    ):
        assert entry in warning, entry


def test_unreadable_subfolders_are_skipped_and_an_unreadable_folder_is_refused(
    odd, monkeypatch, caplog
):
    scandir = os.scandir

    def refuse(path, end):
        if str(path).endswith(end):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, "sub"))
    assert "sub/b.png" not in [r["image_id"] for r in load_image_folder(str(odd))]
    assert "sub/: cannot be listed, Permission denied" in caplog.text
    monkeypatch.setattr(os, "scandir", lambda path: refuse(path, "photos"))
    with pytest.raises(UserError, match="photos cannot be read: .*Permission denied"):
        load_image_folder(str(odd))


def test_very_deep_folders(tmp_path):
    deep = "d/" * 1200
    folder = os.open(tmp_path, os.O_RDONLY)
    for _ in range(1200):
        os.mkdir("d", dir_fd=folder)
        inner = os.open("d", os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(os.open("x.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)
    try:
        (record,) = load_image_folder(str(tmp_path))
        assert record["image_id"] == f"{deep}x.jpg"
    finally:  # too deep for pytest
        subprocess.run(["rm", "-r", str(tmp_path / "d")], check=True)


def test_regions_and_training_of_such_a_folder(odd, tmp_path, soco_views):
    records = get_records(f"folder://{odd}")
    out = str(tmp_path / "r.arrow")
    assert make_regions(records, out, "shapes-v1", workers=1)["images"] == 3
    assert "a\nb.png" in RegionStore.open(out)
    dataset = PretrainDataset(f"folder://{odd}", soco_views, out)
    assert len(dataset) == 3 and len(dataset.batch(0, 0, [0, 1, 2])) == 3


def test_files_that_become_odd_after_they_were_listed(odd, tmp_path, soco_views, caplog):
    dataset = PretrainDataset(f"folder://{odd}", soco_views)
    records = get_records(f"folder://{odd}")
    os.remove(odd / "a\nb.png")
    os.mkfifo(odd / "a\nb.png")
    os.remove(odd / "link.png")
    (odd / "link.png").symlink_to("/dev/zero")
    assert len(dataset.batch(0, 0, [0, 1, 2])) == 3
    assert r"photos/a\nb.png: not a regular file; replaced by the next image" in caplog.text
    out = str(tmp_path / "r.arrow")
    summary = make_regions(records, out, "shapes-v1", workers=1, max_unreadable=0.7)
    assert (summary["images"], summary["unreadable"]) == (1, 2)
    lines = open(f"{out}.unreadable.txt").read().splitlines()
    assert [line.split("\t")[0] for line in lines] == [r"a\nb.png", "link.png"]
    assert all(line.endswith(": not a regular file") for line in lines)


# Images that are too large to decode


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(bits: int, colour: int, width: int = 30_000, height: int = 20_000) -> bytes:
    """A valid PNG in some kilobytes; its pixels need gigabytes."""
    values = {0: 1, 2: 3, 6: 4}[colour]
    row = bytes(1 + -(-width * bits * values // 8))
    pack = zlib.compressobj(1)
    pixels = b"".join(pack.compress(row) for _ in range(height if bits == 1 else 10))
    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), chunk(b"IDAT", pixels + pack.flush()), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def huge(suffix: str, folder) -> bytes:
    """The header of a small file, with a huge size written into it."""
    path = folder / f"small.{suffix}"
    Image.new("RGB", (258, 259)).save(path)  # 0x102, 0x103
    data = bytearray(path.read_bytes())
    width, height = 60_000, 50_000
    order, size = {
        "jpg": (">HH", (height, width)),
        "gif": ("<HH", (width, height)),
        "bmp": ("<ii", (width, height)),
        "jp2": (">II", (height, width)),
    }[suffix]
    small = (259, 258) if size[0] == height else (258, 259)
    at = data.index(struct.pack(order, *small))
    data[at : at + struct.calcsize(order)] = struct.pack(order, *size)
    return bytes(data)


def huge_tiff(folder) -> bytes:
    path = folder / "small.tif"
    Image.new("RGB", (258, 259)).save(path)
    data = path.read_bytes()
    for tag, small, large in ((256, 258, 60_000), (257, 259, 50_000)):
        for kind, code in ((3, "<HHIHH"), (4, "<HHII")):
            old = struct.pack(code, tag, kind, 1, *([small, 0] if kind == 3 else [small]))
            data = data.replace(old, struct.pack("<HHII", tag, 4, 1, large))
    return data


def test_a_valid_huge_png_is_valid():
    """Decoded at the size of a stamp, so that the test below is about its size alone."""
    pixels = cv2.imdecode(np.frombuffer(huge_png(1, 0, 64, 40), np.uint8), cv2.IMREAD_UNCHANGED)
    assert pixels.shape == (40, 64)


@pytest.mark.parametrize(
    "kind", ["png1", "png8", "png16", "jpg", "gif", "bmp", "jp2", "tif", "ppm", "webp", "avif"]
)
def test_huge_images_are_refused_by_their_header(tmp_path, monkeypatch, kind, soco_views):
    root = tmp_path / "photos"
    root.mkdir()
    path = root / f"huge.{kind.rstrip('0123456789') if 'png' in kind else kind}"
    if kind in ("webp", "avif"):  # their format has no larger sizes than the default limit
        monkeypatch.setenv("REGION_PRETRAIN_MAX_PIXELS", "3000")
        Image.new("RGB", (64, 48)).save(path)
    elif kind == "tif":
        path.write_bytes(huge_tiff(tmp_path))
    elif kind == "ppm":
        path.write_bytes(b"P6 60000 50000 255\n" + bytes(100))
    elif "png" in kind:
        bits = int(kind[3:])
        path.write_bytes(huge_png(bits, {1: 0, 8: 2, 16: 6}[bits]))
    else:
        path.write_bytes(huge(kind, tmp_path))

    def decode(*args, **kwargs):
        raise AssertionError("decoded")

    with monkeypatch.context() as patch:
        patch.setattr(cv2, "imdecode", decode)
        patch.setattr(ImageFile.ImageFile, "load", decode)
        for action in (
            lambda: read_image(str(path)),
            lambda: EncodedImage.read(str(path)).size(),
            lambda: EncodedImage.read(str(path)).decode(reduce=8),
        ):
            with pytest.raises(UnreadableImage, match=r"pixels, more than the limit of \d+: to"):
                action()
    if kind != "png1":
        return
    paint(root / "ok.png")
    records = get_records(f"folder://{root}")
    out = str(tmp_path / "r.arrow")
    summary = make_regions(records, out, "shapes-v1", workers=1, max_unreadable=0.5)
    assert (summary["images"], summary["unreadable"]) == (1, 1)
    assert "30000x20000 pixels" in open(f"{out}.unreadable.txt").read()
    dataset = PretrainDataset(f"folder://{root}", soco_views)
    assert len(dataset.batch(0, 0, [0, 1])) == 2
