"""The folders that ship beside the package: ``configs/``, ``projects/`` and ``tools/``.

In a checkout they are beside ``region_pretrain/``. ``setup.py`` copies them into this folder of a
wheel: ``configs/``, ``projects/*/configs/`` and ``tools/``.
"""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent

#: The folder that contains them: the checkout's root, or this folder in an installed wheel.
ROOT = _HERE if (_HERE / "configs").is_dir() else _HERE.parents[1]


def find_shipped(name: str) -> Path | None:
    """The shipped file of this name, e.g. ``configs/detection/NAME.py``; None if there is none."""
    path = ROOT / name
    return path if not name.startswith(".") and path.is_file() else None
