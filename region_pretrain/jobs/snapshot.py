"""A copy of the code for queued jobs, so that later edits of it do not affect them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

from region_pretrain.files import write_text_atomic
from region_pretrain.shipped import ROOT
from region_pretrain.tracking.git import git_state, state_file

PACKAGE = Path(__file__).resolve().parents[1]
_FOLDERS = ("configs", "projects", "tools")


def take_snapshot(folder: str) -> str:
    """Copy the code to ``<folder>/code/<digest>``, unless it is there already.

    The copy has the layout of a checkout, also if the code is that of an installed wheel.

    Args:
        folder: a folder that is visible to all nodes.

    Returns:
        The root of the copy, which contains ``tools/``.
    """
    files = _files()
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
    return dict(sorted(found.items()))
