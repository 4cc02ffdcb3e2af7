"""The drawings of emoji: SVG rasterisation, download, verification and cache."""

import hashlib
import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from region_pretrain.data.emoji import CLASSES, SPLIT_VENDORS, VENDORS, vendors
from region_pretrain.data.emoji.svg import fill_coverage, rasterise
from region_pretrain.data.emoji.vendors import CODE_POINTS, Vendor, drawings, fetch, vendor_folder
from region_pretrain.errors import UserError

#: The user's own cache; fixtures redirect the variable while tests run.
USER_CACHE = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")

#: Digests of each vendor's pixels.
PIXELS = {
    "noto": "6a41c2b1f39a13d0",
    "fluent": "efb2c2df9312a7bc",
    "openmoji": "80cfa582be46a594",
    "twemoji": "2176064d6bffcf3a",
}


def svg(content: str, side: int = 8) -> str:
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {side} {side}">{content}</svg>'


def winding_number(contours: list[np.ndarray], x: float, y: float) -> int:
    """By the crossings of a ray to the left."""
    total = 0
    for contour in contours:
        for (x0, y0), (x1, y1) in zip(contour, np.roll(contour, -1, axis=0), strict=True):
            if min(y0, y1) <= y < max(y0, y1) and x0 + (y - y0) * (x1 - x0) / (y1 - y0) <= x:
                total += 1 if y1 > y0 else -1
    return total


@pytest.mark.parametrize("even_odd", [False, True])
def test_coverage_counts_the_sample_points_inside(even_odd):
    rng = np.random.default_rng(0)
    contours = [rng.uniform(-3, 11, (7, 2)), rng.uniform(0, 8, (5, 2))]  # they cross themselves
    expected = np.zeros((8, 8))
    for y in range(8):
        for x in range(8):
            for i in range(16):
                n = winding_number(contours, x + (i % 4 + 0.5) / 4, y + (i // 4 + 0.5) / 4)
                expected[y, x] += (n % 2 == 1 if even_odd else n != 0) / 16
    assert 0.1 < expected.mean() < 0.9
    np.testing.assert_array_equal(fill_coverage(contours, 8, even_odd), expected)


def test_fill_colours_alpha_and_order():
    picture = rasterise(
        svg(
            '<rect width="4" height="8" fill="#f00"/>'
            '<g fill="#00ff00"><rect x="2" y="0" width="3.5" height="8"/></g>'
            '<polygon points="0,6 8,6 8,8 0,8"/>'
        ),
        8,
    )
    half = round(0.5 * 255)
    row = [(255, 0, 0, 255)] * 2 + [(0, 255, 0, 255)] * 3 + [(0, 255, 0, half)] + [(0, 0, 0, 0)] * 2
    np.testing.assert_array_equal(picture[:6], np.broadcast_to(row, (6, 8, 4)))
    np.testing.assert_array_equal(picture[6:], np.broadcast_to((0, 0, 0, 255), (2, 8, 4)))


@pytest.mark.parametrize(
    ("content", "area"),
    [
        ('<circle cx="32" cy="32" r="20"/>', np.pi * 20**2),
        ('<ellipse cx="32" cy="32" rx="20" ry="10"/>', np.pi * 200),
        ('<path d="M12 32a20 20 0 0 1 40 0z"/>', np.pi * 200),
        ('<path d="M10 10h40v40h-40z m10 10h20v20h-20z"/>', 1600),
        ('<path fill-rule="evenodd" d="M10 10h40v40h-40z m10 10h20v20h-20z"/>', 1200),
        ('<line x1="10" y1="32" x2="50" y2="32" stroke="#000" stroke-width="6"/>',
         240 + np.pi * 9),
        ('<circle cx="32" cy="32" r="20" fill="none" stroke="#000" stroke-width="4"/>',
         np.pi * (22**2 - 18**2)),
        ('<rect width="10" height="10" transform="translate(5 7) scale(2)"/>', 400),
        ('<g transform="scale(2,1)"><rect width="9" height="9" transform="matrix(1 0 1 2 3 4)"/>'
         "</g>", 324),
        ('<rect width="9" height="9" fill="none"/>', 0),
    ],
)  # fmt: skip
def test_area_of_shapes_and_strokes(content, area):
    alpha = rasterise(svg(content, 64), 64)[..., 3] / 255
    assert alpha.sum() == pytest.approx(area, rel=0.006, abs=0.01)


def test_every_vendor_has_a_split_and_training_and_validation_share_none():
    assert set(SPLIT_VENDORS["unlabeled"]) == set(SPLIT_VENDORS["train"])
    assert not set(SPLIT_VENDORS["train"]) & set(SPLIT_VENDORS["val"])
    assert {v for names in SPLIT_VENDORS.values() for v in names} == set(VENDORS)
    assert len(CLASSES) == len(set(CODE_POINTS.values())) == 24


def package(folder: Path) -> tuple[Path, str]:
    """An npm archive of PNG drawings: class i is an opaque square of side 10 + i in 64 pixels."""
    path = folder / "package.tgz"
    with tarfile.open(path, "w:gz") as archive:
        for i, code in enumerate(CODE_POINTS.values()):
            image = Image.new("RGBA", (64, 64))
            image.paste((10 * i, 0, 255, 255), (20, 20, 30 + i, 30 + i))
            image.save(data := io.BytesIO(), "PNG")
            info = tarfile.TarInfo(f"package/{code:x}.png")
            info.size = len(data.getvalue())
            archive.addfile(info, io.BytesIO(data.getvalue()))
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Replace npm by a shell script that is the only program on the path."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def npm(script: str) -> None:
        path = tmp_path / "bin" / "npm"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return npm


def test_downloaded_once_verified_and_cached(tmp_path, npm, monkeypatch, cache):
    archive, digest = package(tmp_path)
    monkeypatch.setitem(VENDORS, "noto", Vendor("fake@1.0", digest, "package/{code:x}.png"))
    npm(f'echo "$@" >> {tmp_path}/calls; /bin/cp {archive} fake-1.0.tgz')
    folder = fetch("noto")
    assert folder == vendor_folder("noto") == cache / "emoji" / f"noto-{digest[:10]}-128px"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{name}.png" for name in CLASSES)
    for i, drawing in enumerate(drawings("noto")):
        pixels = np.asarray(drawing)  # scaled by 2; transparent borders are cropped
        assert abs(pixels.shape[0] - 2 * (10 + i)) <= 4 and pixels.shape[0] == pixels.shape[1]
        center = pixels[len(pixels) // 2, len(pixels) // 2]
        np.testing.assert_array_equal(center, (10 * i, 0, 255, 255))
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("pack ") and call.endswith(" fake@1.0")
    assert [p for p in folder.parent.iterdir() if p.is_dir()] == [folder]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, r"No such file or directory: 'npm'"),
        ("echo 'npm error code ENOTFOUND' >&2; exit 1", r"npm error code ENOTFOUND"),
        ("exit 3", r"exit status 3"),
        ("exit 0", r"npm wrote no archive"),
    ],
)
def test_one_line_says_how_to_get_drawings_without_npm(npm, script, message):
    if script:
        npm(script)
    with pytest.raises(UserError, match=message) as caught:
        fetch("twemoji")
    text = str(caught.value)
    assert "\n" not in text and "@twemoji/svg@15.0.0" in text
    assert f"install npm and connect to its registry, or copy {vendor_folder('twemoji')}" in text
    assert not vendor_folder("twemoji").exists()


def test_another_archive_is_refused(tmp_path, npm):
    archive, digest = package(tmp_path)
    npm(f"/bin/cp {archive} x.tgz")
    with pytest.raises(UserError, match=f"sha256 {digest}, not {VENDORS['noto'].sha256}"):
        fetch("noto")
    assert not vendor_folder("noto").exists()


@pytest.mark.parametrize("vendor", VENDORS)
def test_the_real_drawings_where_they_can_be_had(vendor, monkeypatch, record_property):
    """Pixels of the real drawings; offline and without a cache, the message instead."""
    monkeypatch.setenv("XDG_CACHE_HOME", USER_CACHE)
    cached = vendor_folder(vendor).is_dir()
    try:
        images = drawings(vendor)
    except UserError as error:
        print(f"{vendor}: not available, only the message is tested: {error}")
        record_property("drawings", "not available")
        assert "\n" not in str(error) and str(vendor_folder(vendor)) in str(error)
        return
    print(f"{vendor}: tested the {'cached' if cached else 'downloaded'} drawings")
    record_property("drawings", "cached" if cached else "downloaded")
    digest = hashlib.sha256(b"".join(np.asarray(i).tobytes() for i in images)).hexdigest()
    assert digest[:16] == PIXELS[vendor]
    assert vendors.DRAWING_SIDE == 128 and len(images) == 24
    for name, image in zip(CLASSES, images, strict=True):
        opaque = (np.asarray(image)[..., 3] >= 128).mean()
        assert 60 <= max(image.size) <= 128 and 0.2 < opaque < 0.95, name
