"""The commit that a run is made from."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]


def state_file(copy: Path) -> Path:
    """The file beside a copy of a checkout that contains the checkout's state."""
    return copy.with_name(f"{copy.name}.git.json")


def git_state() -> dict[str, dict[str, Any]]:
    """Commit of this library, and of the working directory if that is another repository.

    Returns:
        ``region_pretrain`` and ``working_directory`` -> ``commit``, and ``dirty``: whether tracked
        files differ from it. What is not in a repository is left out.
    """
    state, top = {}, None
    if state_file(PROJECT).is_file():
        state["region_pretrain"] = json.loads(state_file(PROJECT).read_text())
    # An installed library may lie below an unrelated repository, as a virtual environment does.
    elif _git(PROJECT, "ls-files", "--error-unmatch", "region_pretrain/__init__.py") is not None:
        top = _git(PROJECT, "rev-parse", "--show-toplevel")
        state["region_pretrain"] = state_of(PROJECT)
    here = os.getcwd()
    if _git(here, "rev-parse", "--show-toplevel") != top:
        state["working_directory"] = state_of(here)
    return {name: found for name, found in state.items() if found}


def state_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Commit and ``dirty`` of the repository that contains a folder; empty if there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {} if commit is None or changes is None else {"commit": commit, "dirty": bool(changes)}


def _git(folder: str | os.PathLike[str], *arguments: str) -> str | None:
    """Output of a git command; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            errors="surrogateescape",  # folders may have any bytes in their names
            timeout=20,  # a large repository on a network file system
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
