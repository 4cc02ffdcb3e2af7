"""The commit of this checkout and of the user's own repository."""

import os
import subprocess
from pathlib import Path

import pytest

from region_pretrain.jobs.snapshot import take_snapshot
from region_pretrain.tracking import git


def run(folder, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def repository(tmp_path):
    run(tmp_path, "init", "-q")
    (tmp_path / "a.py").write_text("1")
    run(tmp_path, "add", ".")
    run(tmp_path, "commit", "-q", "-m", "one")
    return tmp_path


def test_commit_and_changes_of_tracked_files(repository):
    commit = run(repository, "rev-parse", "HEAD")
    (repository / "new").write_text("not tracked")
    (repository / "folder").mkdir()
    assert git.state_of(repository / "folder") == {"commit": commit, "dirty": False}
    (repository / "a.py").write_text("2")
    assert git.state_of(repository) == {"commit": commit, "dirty": True}


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_folders_may_have_any_bytes_in_their_names(tmp_path, monkeypatch):
    folder = os.fsencode(tmp_path) + b"/\xe9tudes"
    os.mkdir(folder)
    run(os.fsdecode(folder), "init", "-q")
    monkeypatch.chdir(os.fsdecode(folder))
    git.git_state()


def test_no_repository_and_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert git.state_of(tmp_path) == {}
    monkeypatch.setenv("PATH", "")
    assert git.state_of(git.PROJECT) == {} and git.git_state() == {}


def test_the_working_directory_is_listed_if_it_is_another_repository(repository, monkeypatch):
    monkeypatch.chdir(repository)
    state = git.git_state()
    assert state["working_directory"] == git.state_of(repository)
    monkeypatch.chdir(git.PROJECT)
    assert "working_directory" not in git.git_state()


def test_an_installed_library_is_not_of_the_repository_around_it(repository, monkeypatch):
    monkeypatch.chdir(repository)
    monkeypatch.setattr(git, "PROJECT", repository)
    assert git.git_state() == {"working_directory": git.state_of(repository)}


def test_a_copied_checkout_has_the_state_of_its_original(repository, monkeypatch):
    monkeypatch.chdir(os.sep)
    here = git.git_state()["region_pretrain"]
    copy = Path(take_snapshot(str(repository / "run")))
    monkeypatch.setattr(git, "PROJECT", copy)
    assert here == git.git_state()["region_pretrain"] and len(here["commit"]) == 40
