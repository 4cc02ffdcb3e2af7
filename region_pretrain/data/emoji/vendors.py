"""The drawings: downloaded once by npm, verified, and kept as small PNG files in the user's cache.

The cache is ``$XDG_CACHE_HOME/region_pretrain/emoji``. It contains one folder per vendor,
about 1 MB in total, and can be copied to machines without a network.
"""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from region_pretrain.data.coco_json import cache_folder
from region_pretrain.data.emoji.svg import rasterise
from region_pretrain.errors import UserError
from region_pretrain.files import locked

logger = logging.getLogger(__name__)

#: Side of a cached drawing in pixels.
DRAWING_SIDE = 128

#: Class -> the Unicode code point of its emoji. Every vendor has drawn all of them.
CODE_POINTS: dict[str, int] = {
    "elephant": 0x1F418,
    "turtle": 0x1F422,
    "fish": 0x1F41F,
    "penguin": 0x1F427,
    "butterfly": 0x1F98B,
    "crab": 0x1F980,
    "snail": 0x1F40C,
    "owl": 0x1F989,
    "apple": 0x1F34E,
    "banana": 0x1F34C,
    "strawberry": 0x1F353,
    "pizza": 0x1F355,
    "hamburger": 0x1F354,
    "mushroom": 0x1F344,
    "car": 0x1F697,
    "bus": 0x1F68C,
    "bicycle": 0x1F6B2,
    "rocket": 0x1F680,
    "helicopter": 0x1F681,
    "sailboat": 0x26F5,
    "guitar": 0x1F3B8,
    "alarm clock": 0x23F0,
    "key": 0x1F511,
    "cactus": 0x1F335,
}
CLASSES: tuple[str, ...] = tuple(CODE_POINTS)


@dataclass(frozen=True)
class Vendor:
    """Where a vendor's drawings come from.

    Attributes:
        package: npm package and version.
        sha256: digest of the package's archive.
        pattern: path of a drawing in the archive; ``code`` is the code point.
    """

    package: str
    sha256: str
    pattern: str


#: Vendor -> package. All of them together are a download of 55 MB.
VENDORS: dict[str, Vendor] = {
    "noto": Vendor(
        "emoji-datasource-google@4.0.4",
        "0781c9b0ef328e334c4a1c47901ceeaffb25e63439718d33157d1c47bbc96c80",
        "package/img/google/64/{code:04x}.png",
    ),
    "fluent": Vendor(
        "@lobehub/fluent-emoji-3d@1.1.0",
        "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58",
        "package/assets/{code:04x}.webp",
    ),
    "openmoji": Vendor(
        "openmoji@17.0.0",
        "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
        "package/color/svg/{code:04X}.svg",
    ),
    "twemoji": Vendor(
        "@twemoji/svg@15.0.0",
        "1d2907557a422c7c4e3feca50ef915c39da1db3d76b4a4d7e73fb59bce4403c3",
        "package/{code:04x}.svg",
    ),
}


def vendor_folder(vendor: str) -> Path:
    """Folder of a vendor's drawings, ``CLASS.png`` each; it exists once they are complete."""
    name = f"{vendor}-{VENDORS[vendor].sha256[:10]}-{DRAWING_SIDE}px"
    return Path(cache_folder(), "emoji", name)


def _download(package: str, folder: str) -> bytes:
    """The archive of an npm package.

    Raises:
        OSError, subprocess.SubprocessError: npm is missing or failed.
    """
    command = ["npm", "pack", "--loglevel=error", "--fetch-retries=1", "--ignore-scripts", package]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=600)
    for archive in Path(folder).glob("*.tgz"):
        return archive.read_bytes()
    raise OSError("npm wrote no archive")


def read_drawing(data: bytes, path: str) -> Image.Image:
    """Decode or rasterise a drawing.

    Args:
        data: content of the file.
        path: its name, which tells SVG from other formats.

    Returns:
        An RGBA image of side :data:`DRAWING_SIDE`.
    """
    if path.endswith(".svg"):
        return Image.fromarray(rasterise(data.decode(), DRAWING_SIDE))
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    return image.resize((DRAWING_SIDE, DRAWING_SIDE), Image.Resampling.BICUBIC)


def fetch(vendor: str) -> Path:
    """Download a vendor's drawings unless they are in the cache.

    Args:
        vendor: a key of :data:`VENDORS`.

    Returns:
        Their folder.

    Raises:
        UserError: they cannot be downloaded, or are not the expected version.
    """
    folder, source = vendor_folder(vendor), VENDORS[vendor]
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(str(folder)), tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        if folder.is_dir():  # another process downloaded it meanwhile
            return folder
        logger.info("Downloading emoji drawings: npm package %s", source.package)
        try:
            data = _download(source.package, temporary)
        except (OSError, subprocess.SubprocessError) as error:
            lines = (getattr(error, "stderr", None) or str(error)).split("\n")
            reason = next((line for line in lines if line.strip()), "no message").strip()
            raise UserError(
                f"emoji: npm could not download {source.package} ({reason}); install npm and "
                f"connect to its registry, or copy {folder} from a machine that has it"
            ) from error
        if (digest := hashlib.sha256(data).hexdigest()) != source.sha256:
            raise UserError(
                f"emoji: the npm package {source.package} has sha256 {digest}, not "
                f"{source.sha256}; use npm's own registry, or copy {folder} from another machine"
            )
        complete = Path(temporary, "drawings")
        complete.mkdir()
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            for name, code in CODE_POINTS.items():
                path = source.pattern.format(code=code)
                drawing = read_drawing(archive.extractfile(path).read(), path)
                drawing.save(complete / f"{name}.png")
        complete.rename(folder)
    return folder


@functools.cache
def _load(folder: Path) -> tuple[Image.Image, ...]:
    images = [Image.open(folder / f"{name}.png").convert("RGBA") for name in CLASSES]
    return tuple(image.crop(image.getbbox()) for image in images)


def drawings(vendor: str) -> tuple[Image.Image, ...]:
    """A vendor's drawings in the order of :data:`CLASSES`: RGBA, without transparent borders.

    Raises:
        UserError: see :func:`fetch`.
    """
    return _load(fetch(vendor))
