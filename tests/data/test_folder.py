"""Which files of a folder are images of the data set."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from empty_files import touch
from PIL import Image

from region_pretrain.data.catalog import get_records
from region_pretrain.data.folder import (
    IMAGE_EXTENSIONS,
    load_image_folder,
    refuse_output_among_images,
)
from region_pretrain.errors import UserError
from region_pretrain.images import read_image


def test_folder_is_listed_sorted_nested_and_by_extension(tmp_path):
    images = ["b.JPG", "a/2.png", "a/10.jpeg", "a-b/x.webp", "z/y/q.TIF", "B.bmp", "é/ü.pgm"]
    images += ["c.tiff", "d.ppm", "e.jfif", "f.jpe", "g.gif", "h.avif", "i.jp2"]
    others = ["notes.txt", ".hidden.jpg", ".git/x.png", "a/._2.png", "jpg", "x.jpg.part"]
    touch(tmp_path, *images, *others)
    (tmp_path / "folder.jpg").mkdir()
    records = get_records(f"folder://{tmp_path}")
    assert [r["image_id"] for r in records] == sorted(images)
    for record in records:
        assert Path(record["file_name"]) == tmp_path / record["image_id"]
        assert set(record) == {"file_name", "image_id"}


def test_folder_may_be_relative_or_in_the_home(tmp_path, monkeypatch):
    touch(tmp_path, "x/1.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for root in ("x", "./x/", "~/x", f"{tmp_path}/x/"):
        (record,) = get_records(f"folder://{root}")
        assert record["image_id"] == "1.png" and os.path.samefile(record["file_name"], "x/1.png")


def test_links_are_followed_and_loops_are_not(tmp_path):
    elsewhere = touch(tmp_path / "elsewhere", "1.jpg")
    root = touch(tmp_path / "root", "a/2.jpg")
    (root / "linked").symlink_to(elsewhere)
    (root / "a" / "loop").symlink_to(root)
    (root / "gone.jpg").symlink_to(tmp_path / "nowhere")
    keys = [r["image_id"] for r in load_image_folder(str(root))]
    # A dangling link is an unreadable file, which is reported when it is read.
    assert keys == ["a/2.jpg", "gone.jpg", "linked/1.jpg"]


def test_a_file_name_that_is_not_unicode_is_skipped_and_named(tmp_path, caplog):
    open(os.path.join(os.fsencode(tmp_path), b"caf\xe9.jpg"), "wb").close()
    with pytest.raises(UserError, match="has no images .*1 were skipped"):
        load_image_folder(str(tmp_path))
    touch(tmp_path, "a.jpg")
    assert [r["image_id"] for r in load_image_folder(str(tmp_path))] == ["a.jpg"]
    assert r"caf\udce9.jpg: its name is not UTF-8" in caplog.text


@pytest.mark.parametrize("ending", IMAGE_EXTENSIONS)
def test_every_listed_ending_is_read(tmp_path, ending):
    pixels = np.full((24, 32, 3), (200, 40, 90), np.uint8)
    path = tmp_path / f"x{ending}"
    Image.fromarray(pixels if ending != ".pgm" else pixels[..., 0]).save(path)
    read = read_image(str(path)).astype(int)
    assert read.shape == (24, 32, 3)
    expected = pixels if ending != ".pgm" else pixels[..., :1]
    assert np.abs(read - expected).max() <= 6  # lossy formats


def test_other_endings_are_counted_and_unread_images_are_a_warning(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b.txt", "c.TXT", "sub/d.json", "README")
    with caplog.at_level("INFO", "region_pretrain"):
        load_image_folder(str(tmp_path))
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert "skipped files that are not read: 2 .txt, 1 " in record.message
    touch(tmp_path, "e.heic", "f.HEIC", "g.dng")
    caplog.clear()
    load_image_folder(str(tmp_path))
    (record,) = caplog.records
    assert record.levelname == "WARNING" and "2 .heic" in record.message
    assert record.message.endswith("convert .dng .heic to use these images")


def test_a_folder_without_images_names_what_it_has(tmp_path):
    touch(tmp_path, "e.heic", "f.heic", "g.txt")
    with pytest.raises(UserError, match=r"has no images .*; its files: 2 \.heic, 1 \.txt"):
        load_image_folder(str(tmp_path))


def test_outputs_in_the_folder_are_no_images(tmp_path, caplog):
    touch(tmp_path, "a.jpg", "b.preview.png", "regions.arrow", "regions.arrow.preview.png")
    touch(tmp_path, "out/config.yaml", "out/metrics.json", "out/pictures/1.png")
    touch(
        tmp_path, "sweep/sweep.json", "sweep/pictures/1.png", "config/config.yaml", "config/1.png"
    )
    with caplog.at_level("INFO", "region_pretrain"):
        keys = [record["image_id"] for record in load_image_folder(str(tmp_path))]
    assert keys == ["a.jpg", "b.preview.png", "config/1.png"]
    for output in ("regions.arrow.preview.png", "out/", "sweep/"):
        assert f"skipped {output}, which is an output" in caplog.text


def test_pictures_are_not_written_among_the_images(tmp_path, monkeypatch):
    touch(tmp_path / "photos", "a.jpg")
    monkeypatch.chdir(tmp_path / "photos")
    for path in ("views.png", "new/views.PNG", "../photos/views.png"):
        with pytest.raises(UserError, match="would become one of the images of folder://"):
            refuse_output_among_images(path, ["imagenet_train", f"folder://{tmp_path}/photos"])
    for path in ("../views.png", "views.svg", str(tmp_path / "photos2" / "views.png")):
        refuse_output_among_images(path, f"folder://{tmp_path}/photos")
