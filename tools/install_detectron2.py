#!/usr/bin/env python3
"""Install Detectron2 0.6, which is not available on a package index under its own name.

This project needs only the pure-Python part of Detectron2: ROIAlign and NMS come from torchvision.
The package ``EZannot`` contains a full copy in which only the import prefix was rewritten. This
tool downloads that wheel, restores the prefix, verifies that the result is byte for byte upstream
commit 28fd05e, and installs it as an ordinary package that ``pip list``, ``pip show`` and ``pip
uninstall`` recognise. Nothing else from that package is installed. A working Detectron2 is left
unchanged.

    python tools/install_detectron2.py                      # the pure-Python copy, no compiler
    python tools/install_detectron2.py --from git           # the official source, compiled here
    python tools/install_detectron2.py --from ~/detectron2  # a checkout, or a wheel
    python tools/install_detectron2.py --wheel-dir wheels   # keep the wheel for other machines

Requires only the standard library and pip.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

COMMIT = "28fd05eeb68114aa8a8d915168bdf6e7f7b5c2a6"  # 10 October 2024
GIT_SOURCE = f"git+https://github.com/facebookresearch/detectron2.git@{COMMIT}"
VERSION = f"0.6+{COMMIT[:7]}"
WHEEL_NAME = f"detectron2-{VERSION}-py3-none-any.whl"
DIST_INFO = f"detectron2-{VERSION}.dist-info"

CARRIER = "EZannot==1.1.0"
CARRIER_SHA256 = "eb3db02d9a2fba6fa2934b25738a106087faccceb3629124d4d4b8e65759c0d7"
CARRIER_PREFIX = "EZannot/detectron2/"

#: ``tree_sha256`` of the upstream commit.
TREE_SHA256 = "240a843a2a24eb581e3e88f6ae87e7d23a33430821d922e197dfb25de4f5de0d"
#: Elsewhere in upstream's repository; only its ``setup.py`` copies them into the package.
NOT_IN_TREE = ("projects/", "model_zoo/configs/")

METADATA = f"""\
Metadata-Version: 2.1
Name: detectron2
Version: {VERSION}
Summary: FAIR's next-generation research platform for object detection and segmentation
Home-page: https://github.com/facebookresearch/detectron2
Author: FAIR
License: Apache-2.0
License-File: LICENSE
Classifier: License :: OSI Approved :: Apache Software License
Requires-Python: >=3.7
Requires-Dist: torch
Requires-Dist: torchvision
Requires-Dist: numpy
Requires-Dist: Pillow>=7.1
Requires-Dist: matplotlib
Requires-Dist: pycocotools>=2.0.2
Requires-Dist: termcolor>=1.1
Requires-Dist: yacs>=0.1.8
Requires-Dist: tabulate
Requires-Dist: cloudpickle
Requires-Dist: tqdm>4.29.0
Requires-Dist: tensorboard
Requires-Dist: fvcore>=0.1.5,<0.1.6
Requires-Dist: iopath>=0.1.7
Requires-Dist: omegaconf>=2.1,<2.4
Requires-Dist: hydra-core>=1.1
Requires-Dist: packaging
Requires-Dist: scipy>1.5.1
Requires-Dist: setuptools<81
Provides-Extra: to-py
Requires-Dist: black; extra == "to-py"

The Python sources of Detectron2, commit {COMMIT},
without its compiled extension: rotated boxes and deformable convolution need a build of the
official source.
"""

WHEEL = """\
Wheel-Version: 1.0
Generator: install_detectron2
Root-Is-Purelib: true
Tag: py3-none-any
"""


class InstallError(Exception):
    """A one-line message: what is wrong and how to fix it."""


def tree_sha256(files: Mapping[str, bytes]) -> str:
    """Digest of ``sha256sum``'s listing of Detectron2's ``.py`` files, sorted by path.

    Args:
        files: path relative to ``detectron2/`` -> content.
    """
    listing = "".join(
        f"{hashlib.sha256(files[path]).hexdigest()}  {path}\n"
        for path in sorted(files)
        if path.endswith(".py") and not path.startswith(NOT_IN_TREE)
    )
    return hashlib.sha256(listing.encode()).hexdigest()


def extract_detectron2(carrier: Path) -> dict[str, bytes]:
    """Extract Detectron2's files from the carrier wheel and restore their import prefix.

    Args:
        carrier: the downloaded wheel.

    Returns:
        Path relative to ``detectron2/`` -> content.

    Raises:
        InstallError: the wheel, or the extracted tree, does not have the expected digest.
    """
    digest = hashlib.sha256(carrier.read_bytes()).hexdigest()
    if digest != CARRIER_SHA256:
        raise InstallError(
            f"{carrier.name}: sha256 is {digest}, expected {CARRIER_SHA256}; nothing was "
            "installed: download it again or use --from git"
        )
    files = {}
    with zipfile.ZipFile(carrier) as wheel:
        for name in wheel.namelist():
            if name.startswith(CARRIER_PREFIX) and not name.endswith("/"):
                content = wheel.read(name)
                if name.endswith(".py"):
                    content = content.replace(b"EZannot.detectron2", b"detectron2")
                files[name[len(CARRIER_PREFIX) :]] = content
    digest = tree_sha256(files)
    if digest != TREE_SHA256:
        raise InstallError(
            f"{carrier.name}: its Detectron2 is not commit {COMMIT[:7]} (tree {digest}, expected "
            f"{TREE_SHA256}); nothing was installed: use --from git"
        )
    return files


def write_wheel(files: Mapping[str, bytes], folder: Path) -> Path:
    """Write Detectron2 as a wheel, byte for byte reproducible.

    Args:
        files: path relative to ``detectron2/`` -> content.
        folder: the output folder.

    Returns:
        The wheel's path.
    """
    licence = (
        Path(__file__).resolve().parents[1] / "LICENSE"
    )  # Apache-2.0, the same as Detectron2's
    members = {f"detectron2/{path}": files[path] for path in sorted(files)}
    members[f"{DIST_INFO}/LICENSE"] = licence.read_bytes()
    members[f"{DIST_INFO}/METADATA"] = METADATA.encode()
    members[f"{DIST_INFO}/WHEEL"] = WHEEL.encode()
    record = []
    for name, content in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        record.append(f"{name},sha256={digest},{len(content)}\n")
    record.append(f"{DIST_INFO}/RECORD,,\n")
    members[f"{DIST_INFO}/RECORD"] = "".join(record).encode()

    folder.mkdir(parents=True, exist_ok=True)
    target = folder / WHEEL_NAME
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, date_time=(2024, 10, 10, 0, 0, 0))
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = 0o100644 << 16
            wheel.writestr(info, content)
    return target


def pip(*arguments: str, failing: str) -> None:
    """Run pip for this Python; ``failing`` is the error message if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if subprocess.run(command).returncode:
        raise InstallError(failing)


def download_carrier(folder: Path) -> Path:
    """Download the wheel that contains Detectron2 and return its path."""
    pip(
        *("download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)),
        CARRIER,
        failing=f"pip could not download {CARRIER} (see its message above); offline, make a wheel "
        "on another machine with --wheel-dir DIR and install it here with --from WHEEL",
    )
    return next(folder.glob("*.whl"))


def build_wheel(source: str, folder: Path) -> Path:
    """Build the official source (a git URL or a checkout) and return the wheel's path."""
    before = set(folder.glob("*.whl"))
    # Its setup.py imports torch, which an isolated build environment lacks.
    pip(
        *("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), source),
        failing=f"pip could not build Detectron2 from {source} (see its message above)",
    )
    wheels = set(folder.glob("detectron2-*.whl"))
    return max(wheels - before or wheels, key=lambda path: path.stat().st_mtime)


def check_wheel(path: Path) -> Path:
    """Return ``path`` if it is a Detectron2 wheel."""
    try:
        with zipfile.ZipFile(path) as wheel:
            is_detectron2 = "detectron2/__init__.py" in wheel.namelist()
    except zipfile.BadZipFile:
        is_detectron2 = False
    if not is_detectron2:
        raise InstallError(f"--from {path}: not a detectron2 wheel")
    return path


def obtain_wheel(source: str, folder: Path) -> Path:
    """Build or find the wheel to install.

    Args:
        source: ``pypi``, ``git``, or the path to a wheel or a checkout.
        folder: where to put a wheel that is built here.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if source == "pypi":
        with tempfile.TemporaryDirectory() as download:
            return write_wheel(extract_detectron2(download_carrier(Path(download))), folder)
    if source == "git":
        return build_wheel(GIT_SOURCE, folder)
    path = Path(source).expanduser()
    if path.is_file():
        return check_wheel(path)
    if not ((path / "setup.py").is_file() and (path / "detectron2" / "__init__.py").is_file()):
        raise InstallError(
            f"--from {source}: neither a detectron2 wheel or checkout, nor 'pypi' or 'git'"
        )
    return build_wheel(str(path.resolve()), folder)


def install_wheel(wheel: Path) -> None:
    """Install a wheel by name; by path, ``pip freeze`` would show the temporary path."""
    with tempfile.TemporaryDirectory() as alone:
        shutil.copy(wheel, alone)
        # Its requirements are part of our own (setup.py), pinned by our constraints.
        pip(
            *("install", "--no-deps", "--no-index", "--find-links", alone),
            f"detectron2==={wheel.name.split('-')[1]}",
            failing=f"pip could not install {wheel.name} (see its message above)",
        )


def find_installed() -> str | None:
    """Version and location of the Detectron2 that this Python imports; None if not installed.

    Raises:
        InstallError: it is installed, but importing it fails.
    """
    try:
        module = importlib.import_module("detectron2")
    except ImportError as error:
        if error.name == "detectron2":
            return None
        raise InstallError(f"detectron2 is installed, but importing it fails: {error}") from error
    if module.__file__ is None:  # a folder that happens to be called detectron2
        return None
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        version = module.__version__
    return f"Detectron2 {version} in {PurePosixPath(module.__file__).parent}"


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--from",
        dest="source",
        default="pypi",
        metavar="pypi|git|PATH",
        help="the pure-Python copy (default), the official source, or a checkout or wheel",
    )
    parser.add_argument(
        "--wheel-dir",
        type=Path,
        metavar="DIR",
        help="keep the wheel in this folder; if Detectron2 already works, do only this",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    try:
        installed = find_installed()
        if installed:
            print(f"{installed} works: left unchanged")
            if args.wheel_dir is None:
                return 0
        with tempfile.TemporaryDirectory() as scratch:
            wheel = obtain_wheel(args.source, args.wheel_dir or Path(scratch))
            if args.wheel_dir is not None:
                print(f"wheel: {wheel}")
            if not installed:
                install_wheel(wheel)
    except InstallError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
