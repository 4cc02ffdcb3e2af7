"""A copy of the code that a queued job runs, whatever becomes of the checkout meanwhile."""

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
    """A file of the checkout, as a command line typed here would name it.

    Args:
        path: relative to the checkout's root.

    Raises:
        UserError: it is not there, as in an installed package.
    """
    if not (CHECKOUT / path).is_file():
        raise UserError(f"no {CHECKOUT / path}: run this from a checkout of the repository")
    relative = os.path.relpath(CHECKOUT / path)
    return str(CHECKOUT / path) if relative.startswith("..") else relative


def take_snapshot(folder: str) -> str:
    """Copy the code of this checkout to ``<folder>/code/<digest>``.

    Args:
        folder: all nodes must see it.

    Returns:
        The copy's root, which has ``tools/`` in it. The same code is kept once.

    Raises:
        UserError: this is an installed package without the tools.
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
    except OSError:  # another submission was faster
        shutil.rmtree(part)
    return str(root)
