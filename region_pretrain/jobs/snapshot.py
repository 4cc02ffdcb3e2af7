"""A copy of the code for queued jobs, so that later edits of the checkout do not affect them."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from region_pretrain.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[2]
_FOLDERS = ("region_pretrain", "projects", "configs", "tools")


def in_checkout(path: str) -> str:
    """The path of a checkout's file: relative if it is below the working directory.

    Args:
        path: path relative to the checkout's root.

    Raises:
        UserError: the file does not exist, as in an installed package.
    """
    if not (CHECKOUT / path).is_file():
        raise UserError(f"no {CHECKOUT / path}: run this from a checkout of the repository")
    relative = os.path.relpath(CHECKOUT / path)
    return str(CHECKOUT / path) if relative.startswith("..") else relative


def take_snapshot(folder: str) -> str:
    """Copy the code of this checkout to ``<folder>/code/<digest>``, unless it is there already.

    Args:
        folder: a folder that is visible to all nodes.

    Returns:
        The root of the copy, which contains ``tools/``.

    Raises:
        UserError: this is not a checkout but an installed package, which has no ``tools/``.
    """
    if not (CHECKOUT / "tools").is_dir():
        raise UserError(f"no {CHECKOUT / 'tools'}: run this from a checkout of the repository")
    files = sorted(
        path
        for name in _FOLDERS
        for path in (CHECKOUT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    )
    digest = hashlib.sha256()
    for path in files:
        name, data = str(path.relative_to(CHECKOUT)).encode(), path.read_bytes()
        digest.update(b"%d %d " % (len(name), len(data)) + name + data)
    root = Path(folder).resolve() / "code" / digest.hexdigest()[:16]
    if root.is_dir():
        return str(root)
    root.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=".part-", dir=root.parent))
    part.chmod(0o755)
    for path in files:
        target = part / path.relative_to(CHECKOUT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    try:
        os.rename(part, root)
    except OSError:  # another submission has just made the same copy
        shutil.rmtree(part)
    return str(root)
