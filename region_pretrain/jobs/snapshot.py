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
_TARGET = re.compile(r"""(?<!\w)_target_["']?\s*[:=]\s*["']?(\w+)\.""")
_LARGEST = 20_000_000  # bytes of a package that is copied

logger = logging.getLogger(__name__)


def packages_of(text: str) -> set[str]:
    """The top-level packages of the ``_target_``s in a config or an override."""
    return set(_TARGET.findall(text))


def take_snapshot(folder: str, packages: Iterable[str] = ()) -> str:
    """Copy the code to ``<folder>/code/<digest>``, unless it is there already.

    The copy has the layout of a checkout, also if the code is that of an installed wheel, and
    beside it the packages of the user's own.

    Args:
        folder: a folder that is visible to all nodes.
        packages: top-level packages that are copied as well, unless they are installed or have more
            than 20 MB.

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
    """Path in the copy -> file, sorted."""
    shipped = [ROOT / name for name in _FOLDERS]
    found = {}
    for source, above in ((PACKAGE, PACKAGE.parent), *((folder, ROOT) for folder in shipped)):
        for path in source.rglob("*"):
            in_wheel = source == PACKAGE and any(path.is_relative_to(f) for f in shipped)
            if path.is_file() and "__pycache__" not in path.parts and not in_wheel:
                found[path.relative_to(above).as_posix()] = path
    return found


def _own_files(package: str) -> dict[str, Path]:
    """Path in the copy -> file, of a package that is not installed."""
    spec = importlib.util.find_spec(package)
    if spec is None or package == "region_pretrain":
        return {}
    place = Path(*(spec.submodule_search_locations or [spec.origin or ""])[:1]).resolve()
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "platstdlib")}
    installed = {"site-packages", "dist-packages"}.intersection(place.parts)
    if installed or any(map(place.is_relative_to, libraries)) or not place.exists():
        return {}
    if place.is_file():
        return {place.name: place}
    found, size = {}, 0
    for path in place.rglob("*"):
        below = path.relative_to(place)
        if path.is_file() and not any(p == "__pycache__" or p[0] == "." for p in below.parts):
            found[f"{package}/{below.as_posix()}"] = path
            if (size := size + path.stat().st_size) > _LARGEST:
                logger.warning("%s is not copied, as it has more than 20 MB", place)
                return {}
    return found
