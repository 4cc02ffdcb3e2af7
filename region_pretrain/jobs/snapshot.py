"""A copy of the code for queued jobs, so that later edits of it do not affect them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import re
import shutil
import sysconfig
import tempfile
from collections.abc import Iterable
from pathlib import Path

from region_pretrain.files import write_text_atomic
from region_pretrain.shipped import ROOT
from region_pretrain.tracking.git import git_state, state_file

PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = ("configs", "projects", "tools")
_NAME = re.compile(r"""(?:(?<!\w)_target_["']?\s*[:=]\s*["']?|!!python/name:)(\w+)\.""")
_LARGEST = 20_000_000  # bytes of a package that is copied
#: What the copied code needs is not the user's own, also if it is installed from a checkout.
_REQUIRED = ("region_pretrain", "detectron2", "fvcore", "timm", "torch", "torchvision")

logger = logging.getLogger(__name__)


def packages_of(text: str) -> set[str]:
    """The top-level packages of classes and functions in the text of a config or an override."""
    return set(_NAME.findall(text))


def take_snapshot(folder: str, packages: Iterable[str] = ()) -> str:
    """Copy the code to ``<folder>/code/<digest>``, unless it is there already.

    The copy has the layout of a checkout, also if the code is that of an installed wheel, and
    beside it the packages of the user's own.

    Args:
        folder: a folder that is visible to all nodes.
        packages: top-level packages that are copied as well if they are the user's own: neither in
            ``site-packages`` nor required by this library, and of at most 20 MB.

    Returns:
        The root of the copy, which contains ``tools/``.
    """
    files = _files()
    for name in packages:
        files = _own_files(name) | files
    files = dict(sorted(files.items()))
    digest = hashlib.sha256()
    for target, path in files.items():
        name, data = target.encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(data)) + name + data)
    root = Path(folder).resolve() / "code" / digest.hexdigest()[:16]
    if root.is_dir():
        return str(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    commit = json.dumps(git_state().get("region_pretrain", {}))
    write_text_atomic(str(state_file(root)), f"{commit}\n")
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=root.parent))
    part.chmod(0o755)
    for target, path in files.items():
        (part / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, part / target)
    try:
        os.rename(part, root)
    except OSError:  # another submission has just made the same copy
        shutil.rmtree(part)
    return str(root)


def _files() -> dict[str, Path]:
    """Path in the copy -> file, without what no job reads: pages and definitions of sweeps."""
    shipped = [ROOT / name for name in _FOLDERS]
    found = {}
    for source, above in ((PACKAGE, PACKAGE.parent), *((folder, ROOT) for folder in shipped)):
        for path in source.rglob("*"):
            in_wheel = source == PACKAGE and any(path.is_relative_to(f) for f in shipped)
            name = path.relative_to(above).as_posix()
            unread = name.endswith(".md") or name.startswith("configs/sweeps/")
            if path.is_file() and not (in_wheel or unread or "__pycache__" in path.parts):
                found[name] = path
    return found


def _own_files(package: str) -> dict[str, Path]:
    """Path in the copy -> file, of a package that is not installed."""
    try:
        spec = None if package in _REQUIRED else importlib.util.find_spec(package)
    except ValueError:  # __main__
        spec = None
    if spec is None or not (spec.has_location or spec.submodule_search_locations):
        return {}
    folders = spec.submodule_search_locations
    place = Path(folders[0] if folders else spec.origin).resolve()
    libraries = (Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib"))
    installed = {"site-packages", "dist-packages"}.intersection(place.parts)
    if installed or any(map(place.is_relative_to, libraries)):
        return {}
    if place.is_file():
        return {place.name: place}
    found, size, seen = {}, 0, set()
    for folder, below, names in os.walk(place, followlinks=True):
        below[:] = [name for name in below if name[0] != "." and name != "__pycache__"]
        if (real := os.path.realpath(folder)) in seen:  # a link to a folder above
            below.clear()
            continue
        seen.add(real)
        for path in (Path(folder, name) for name in names if name[0] != "."):
            if path.is_file():  # and no link to nothing
                found[f"{package}/{path.relative_to(place).as_posix()}"] = path
                size += path.stat().st_size
        if size > _LARGEST:
            logger.warning("%s is not copied, as it has more than 20 MB", place)
            return {}
    return found
