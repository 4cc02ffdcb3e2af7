"""Region stores and parts that lie are found, and made again where that is possible."""

import errno
import json
import os
import shutil
import socket
import time

import numpy as np
import pyarrow as pa
import pytest
from damage import changes, damage, fuzz, outcome
from hypothesis import given

from region_pretrain import files
from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, merge_stores, write_store
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.store import CHECKSUM_KEY, MANIFEST_KEY, checksum_of


def rows(n: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        corner = rng.integers(0, 50, (i % 5, 2))
        boxes = np.hstack([corner, corner + rng.integers(1, 50, (i % 5, 2))])
        yield f"{i}.jpg", 100, 100 + i % 3, boxes.astype(np.float32)


def contents(path) -> dict:
    store = RegionStore.open(str(path))
    return {key: (*store.entry(key)[0], store.boxes(key).tolist()) for key in store.keys()}


def rewrite(path, metadata=None, boxes=None) -> None:
    """Change a store as its own writer would: with correct checksums of the manifest."""
    with pa.ipc.open_file(pa.py_buffer(path.read_bytes())) as reader:
        schema, table = reader.schema, reader.read_all()
    if boxes is not None:
        column = pa.array([boxes] * len(table), schema.field("boxes").type)
        table = table.set_column(4, schema.field("boxes"), column)
    if metadata is not None:
        both = {MANIFEST_KEY: metadata, CHECKSUM_KEY: checksum_of(metadata)}
        schema = schema.with_metadata(both)
    path.unlink()  # it may be mapped
    with pa.ipc.new_file(str(path), schema) as writer:
        for batch in table.cast(schema).combine_chunks().to_batches():
            writer.write_batch(batch)


def test_fuzzed_stores_are_the_same_or_refused(tmp_path):
    path = tmp_path / "a.arrow"
    write_store(str(path), rows(40), {"recipe": "x"})
    data, expected, refused = path.read_bytes(), contents(path), []
    manifest = RegionStore.open(str(path)).manifest

    @fuzz(500)
    @given(change=changes())
    def run(change):
        path.unlink()  # an earlier example may still be mapped
        path.write_bytes(change(data))
        found = outcome(lambda: (contents(path), RegionStore.open(str(path)).manifest))
        if isinstance(found, UserError):
            assert "a.arrow" in str(found)
            refused.append(found)
        else:
            assert found == (expected, manifest)

    run()
    assert len(refused) > 250


@pytest.mark.parametrize("column", ["hashes", "box_offsets", "boxes", "widths", "key_bytes"])
def test_every_byte_of_the_rows(tmp_path, column):
    path = tmp_path / "a.arrow"
    write_store(str(path), rows(12), {"recipe": "x"})
    data = path.read_bytes()
    values = bytes(getattr(RegionStore.open(str(path)).chunks[0], column))
    start = data.index(values)
    for at in range(start, start + len(values), max(1, len(values) // 40)):
        path.unlink()
        path.write_bytes(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
        with pytest.raises(UserError, match="a.arrow is .*damaged"):
            contents(path)


@pytest.mark.parametrize(
    "manifest",
    [
        b"[]",
        b"null",
        b"7",
        b"[" * 100_000,
        b"{}",
        b'{"format_version": 2}',
        b'{"format_version": 2, "recipe": 7, "images": 5, "boxes": 10}',
    ],
    ids=range(7),
)
def test_a_manifest_of_another_form_is_one_line(tmp_path, manifest):
    path = tmp_path / "a.arrow"
    write_store(str(path), rows(5), {"recipe": "x"})
    rewrite(path, manifest)
    error = outcome(lambda: RegionStore.open(str(path)))
    assert isinstance(error, UserError) and "a.arrow" in str(error)


def test_a_recipe_that_is_a_number_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    manifest = write_store(str(path), rows(5), {"recipe": "x"})
    rewrite(path, json.dumps({**manifest, "recipe": 7}).encode())
    with pytest.raises(UserError, match=r"a\.arrow.*missing from its manifest: \['recipe'\]"):
        RegionStore.open(str(path))


@pytest.mark.parametrize(
    "box", [[0, 0, np.nan, 5], [0, 0, np.inf, 5], [0, 0, 9, 1e6], [-1, 0, 5, 5], [5, 0, 5, 5]]
)
def test_boxes_are_finite_and_inside_even_with_the_right_checksums(tmp_path, monkeypatch, box):
    path = tmp_path / "a.arrow"
    manifest = write_store(str(path), [("k.jpg", 10, 10, np.array([[0, 0, 5, 5]]))], {"recipe": ""})
    rewrite(path, boxes=[box])
    monkeypatch.setattr(RegionStore, "_check_block", lambda *args: None)
    chunk = RegionStore.open(str(path)).chunks[0]
    monkeypatch.undo()
    changed = {**manifest, "boxes_crc32": [chunk.boxes_crc(0)]}
    del chunk
    rewrite(path, json.dumps(changed).encode(), boxes=[box])
    store = RegionStore.open(str(path))
    with pytest.raises(UserError, match="not finite, empty or not within.*image 'k.jpg'"):
        store.boxes("k.jpg")
    with pytest.raises(UserError, match="not finite"):
        merge_stores([str(path)], str(tmp_path / "b.arrow"), {"recipe": "x"})
    assert not (tmp_path / "b.arrow").exists()


def test_blocks_are_checked_when_they_are_first_read(tmp_path):
    path = tmp_path / "a.arrow"
    write_store(str(path), rows(1000), {"recipe": "x"})
    store = RegionStore.open(str(path))
    assert len(store.manifest["boxes_crc32"]) == 4 and sum(store._checked) == 0
    keys = list(store.keys())
    store.boxes(keys[300])
    assert list(store._checked) == [0, 1, 0, 0]
    data = path.read_bytes()
    at = data.rindex(store.chunks[0].boxes[-1].tobytes())
    path.unlink()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    store = RegionStore.open(str(path))  # the damage is in the last block
    store.boxes(keys[0])
    with pytest.raises(UserError, match="checksum of some boxes"):
        store.boxes(keys[-1])
    with pytest.raises(UserError, match="checksum of some boxes"):
        store.verify()


# Parts


@pytest.fixture
def photos(region_folder):
    """Records of twelve images, and what their regions are."""
    from region_pretrain.data.catalog import get_records

    records = get_records(f"folder://{region_folder.images}")
    return records, contents(region_folder.store)


def make(records, out, shard=(0, 1), recipe="shapes-v1"):
    return make_regions(records, str(out), recipe, workers=1, shard=shard, part_size=3)


def cut(path):
    damage(path, lambda data: data[: len(data) // 2])


def flip(path):
    data = path.read_bytes()
    at = data.index(RegionStore.open(str(path)).chunks[0].boxes.tobytes())
    path.unlink()  # it is mapped
    path.write_bytes(data[:at] + bytes([data[at] ^ 8]) + data[at + 1 :])


def of_another_recipe(path, records):
    out = path.parents[1] / "other.arrow"
    make(records, out, (1, 2), recipe="grid-v1")
    shutil.copy(f"{out}.parts/{path.name}", path)


def of_other_images(path, records):
    shutil.copy(path.parent / "part-000003.arrow", path)


@pytest.mark.parametrize("change", [cut, flip, of_another_recipe, of_other_images])
def test_a_part_that_lies_is_made_again(tmp_path, photos, caplog, change):
    records, expected = photos
    out = tmp_path / "r.arrow"
    assert make(records, out, (1, 2)) is None  # parts 1 and 3 of 4
    part = tmp_path / "r.arrow.parts" / "part-000001.arrow"
    change(part) if change in (cut, flip) else change(part, records)
    # The other shard does not merge it.
    assert make(records, out, (0, 2)) is None and not out.exists()
    assert "this part is made again" in caplog.text and "part-000001.arrow" in caplog.text
    assert make(records, out)["images"] == 12
    assert contents(out) == expected
    assert not os.path.exists(f"{out}.parts")


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_damaged_plan_is_written_again(tmp_path, photos, content):
    records, expected = photos
    out = tmp_path / "r.arrow"
    make(records, out, (1, 2))
    plan = tmp_path / "r.arrow.parts" / "plan.json"
    before = plan.read_bytes()
    plan.write_bytes(content)
    make(records, out, (0, 4))
    assert plan.read_bytes() == before
    make(records, out)
    assert contents(out) == expected


def test_a_damaged_finished_store_is_named_and_kept(tmp_path, photos):
    records, _ = photos
    out = tmp_path / "r.arrow"
    make(records, out)
    boxes = next(b for b in map(RegionStore.open(str(out)).boxes, contents(out)) if len(b))
    data = out.read_bytes()
    at = data.index(boxes.tobytes())
    damaged = data[:at] + bytes([data[at] ^ 64]) + data[at + 1 :]
    out.unlink()
    out.write_bytes(damaged)
    with pytest.raises(UserError, match="r.arrow is damaged: .*delete it"):
        make(records, out)
    assert out.read_bytes() == damaged


def test_files_of_dead_processes_are_removed_by_the_next_run(tmp_path, photos):
    records, _ = photos
    out, parts = tmp_path / "r.arrow", tmp_path / "r.arrow.parts"
    make(records, out, (0, 2))
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    host = socket.gethostname()
    dead = [f"{out}.part-{host}-{pid}", f"{parts}/part-000001.arrow.part-{host}-{pid}"]
    old = f"{parts}/part-000003.arrow.part-elsewhere-1"
    kept = [f"{out}.part-{host}-{os.getppid()}", f"{out}.part-elsewhere-1", f"{tmp_path}/r.part-x"]
    for name in (*dead, old, *kept):
        open(name, "wb").close()
    os.utime(old, (time.time() - 90_000,) * 2)
    make(records, out, (2, 4))
    assert not any(map(os.path.exists, (*dead, old))) and all(map(os.path.exists, kept))


def test_a_folder_of_parts_left_behind_is_removed(tmp_path, photos):
    records, _ = photos
    out, parts = tmp_path / "r.arrow", tmp_path / "r.arrow.parts"
    make(records, out, (1, 2))
    shutil.copytree(parts, tmp_path / "copy")
    make(records, out)
    shutil.copytree(tmp_path / "copy", parts)  # a second run was writing during the merge
    make(records, out)
    assert out.exists() and not parts.exists()


def test_parts_of_an_extension_are_not_removed_by_a_run_on_the_old_images(tmp_path, photos):
    records, expected = photos
    out, parts = tmp_path / "r.arrow", tmp_path / "r.arrow.parts"
    make(records[:6], out)
    make(records, out, (1, 2))
    make(records[:6], out)
    assert (parts / "part-000001.arrow").exists()
    assert make(records, out)["images"] == 12 and contents(out) == expected


@pytest.mark.parametrize("name", ["plan.json", "part-000001.arrow", "progress-0.json", "r.arrow"])
def test_a_full_disk_is_one_line_and_the_run_continues_later(tmp_path, photos, monkeypatch, name):
    records, expected = photos
    out = tmp_path / "r.arrow"

    def write(path, *args):
        if ".part-" in path and path.partition(".part-")[0].endswith(name):
            raise OSError(errno.ENOSPC, "No space left on device")
        return open(path, *args)

    monkeypatch.setattr(files, "open", write, raising=False)
    with pytest.raises(UserError, match="cannot write .*r.arrow: no space left; fix this and run"):
        make(records, out)
    monkeypatch.undo()
    assert not out.exists() and make(records, out)["images"] == 12
    assert contents(out) == expected
