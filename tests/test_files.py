import errno
import os

import pytest

from region_pretrain.files import (
    is_disk_full,
    remove_parts,
    write_atomic,
    write_text_atomic,
)
from region_pretrain.progress import Progress, read_progress, write_progress


def test_an_older_file_is_replaced(tmp_path):
    path = tmp_path / "a.txt"
    write_text_atomic(str(path), "one")
    write_text_atomic(str(path), "zwei – ü")
    assert path.read_text(encoding="utf-8") == "zwei – ü"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_failed_write_leaves_the_older_file_and_no_part(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")

    def fail(f):
        f.write(b"new")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        write_atomic(str(path), fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_the_name_appears_only_when_the_content_is_complete(tmp_path):
    path = tmp_path / "a.bin"
    seen = []
    write_atomic(str(path), lambda f: (f.write(b"x"), seen.append(path.exists())))
    assert seen == [False] and path.read_bytes() == b"x"


@pytest.mark.parametrize(("write", "flushes"), [(write_text_atomic, 40), (write_progress, 0)])
def test_what_is_written_all_the_time_does_not_wait_for_the_disk(
    tmp_path, monkeypatch, write, flushes
):
    path, flushed = str(tmp_path / "a.json"), []
    monkeypatch.setattr(os, "fsync", flushed.append)
    for i in range(1, 21):
        write(path, Progress(i, 20) if write is write_progress else str(i))
        assert os.listdir(tmp_path) == ["a.json"]
    assert len(flushed) == flushes
    if write is write_progress:
        assert (read_progress(path).done, read_progress(path).total) == (20, 20)


def test_parts_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    for name in ("m.pth", "m.pth.part-host-123", "m.part", "partner1"):
        (tmp_path / name).touch()
    remove_parts(str(tmp_path))
    assert sorted(os.listdir(tmp_path)) == ["m.part", "m.pth", "partner1"]


def test_a_full_disk_is_recognised_through_other_errors():
    try:
        try:
            raise OSError(errno.EDQUOT, "Quota exceeded")
        except OSError:
            raise RuntimeError("write failed")  # noqa: B904
    except RuntimeError as error:
        assert is_disk_full(error)
    assert not is_disk_full(OSError(errno.EACCES, "denied"))
    assert not is_disk_full(RuntimeError())
