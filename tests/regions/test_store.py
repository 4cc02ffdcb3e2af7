"""The store against a plain dict: complete, merged, pickled and damaged."""

import hashlib
import json
import pickle
import struct
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from region_pretrain.errors import UserError
from region_pretrain.regions import RegionStore, merge_stores, write_store, writing
from region_pretrain.regions import store as store_module


def _rows(n: int, seed: int = 0) -> list[tuple[str, int, int, np.ndarray]]:
    """Keys of many lengths, not all ASCII; every ninth image without boxes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        corner = rng.integers(0, 50, (i % 9, 2))
        boxes = np.hstack([corner, corner + rng.integers(1, 50, (i % 9, 2))]).astype(np.float32)
        rows.append((f"{'é' * (i % 3)}dir/{i}.jpg", 100 + i % 7, 100 + i % 11, boxes))
    return rows


def _check_against(store: RegionStore, rows) -> None:
    assert len(store) == len(rows)
    for key, width, height, boxes in rows:
        assert key in store
        assert store.size(key) == (width, height)
        found = store.boxes(key)
        assert found.dtype == np.float32 and found.shape == (len(boxes), 4)
        assert np.array_equal(found, boxes)
    assert sorted(store.keys()) == sorted(row[0] for row in rows)
    positions = store.rows([row[0] for row in rows])
    assert sorted(positions) == list(range(len(rows)))
    assert store.counts(positions).tolist() == [len(row[3]) for row in rows]


def test_rows_are_read_as_written(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "_CHUNK_ROWS", 64)  # seven chunks
    rows = _rows(400)
    path = str(tmp_path / "a.arrow")
    manifest = write_store(path, iter(rows), {"recipe": "soco-v1", "anything": [1, 2]})
    store = RegionStore.open(path)
    assert len(store.chunks) == 7
    _check_against(store, rows)
    assert store.manifest == manifest
    assert manifest["recipe"] == "soco-v1" and manifest["anything"] == [1, 2]
    assert manifest["images"] == 400
    assert manifest["boxes"] == sum(len(row[3]) for row in rows)
    assert manifest["format_version"] == 2
    assert set(manifest["versions"]) == {"opencv", "numpy", "region_pretrain"}


def test_the_manifest_is_in_the_schema_for_other_programs(tmp_path):
    path = str(tmp_path / "a.arrow")
    manifest = write_store(path, _rows(10), {"recipe": "x"})
    with pa.ipc.open_file(path) as reader:
        assert json.loads(reader.schema.metadata[b"region_pretrain.regions"]) == manifest
        table = reader.read_all()
    rows = {key: boxes for key, _, _, boxes in _rows(10)}
    for row in table.to_pylist():
        assert np.array_equal(np.array(row["boxes"]).reshape(-1, 4), rows[row["key"]])
        digest = hashlib.blake2b(row["key"].encode(), digest_size=8).digest()
        assert row["key_hash"] == struct.unpack("<Q", digest)[0]
    assert table["key_hash"].to_pylist() == sorted(table["key_hash"].to_pylist())


def test_content_hash_by_hand(tmp_path):
    rows = _rows(20)
    manifest = write_store(str(tmp_path / "a.arrow"), rows, {"recipe": "x"})
    digest = hashlib.sha256()
    by_hash = sorted(
        rows,
        key=lambda r: int.from_bytes(
            hashlib.blake2b(r[0].encode(), digest_size=8).digest(), "little"
        ),
    )
    for key, width, height, boxes in by_hash:
        digest.update(struct.pack("<4q", len(key.encode()), width, height, len(boxes)))
        digest.update(key.encode())
        digest.update(boxes.tobytes())
    assert manifest["sha256"] == digest.hexdigest()


def test_absent_keys(tmp_path):
    rows = _rows(30)
    path = str(tmp_path / "a.arrow")
    write_store(path, rows, {"recipe": "x"})
    store = RegionStore.open(path)
    assert "dir/30.jpg" not in store and "" not in store
    assert store.rows(["nope", rows[3][0], ""]).tolist()[::2] == [-1, -1]
    assert store.rows([]).shape == (0,)
    with pytest.raises(KeyError, match=r"a\.arrow has no regions for image 'nope'"):
        store.boxes("nope")
    with pytest.raises(KeyError):
        store.size("nope")


def test_number_keys_are_found_by_number_and_by_text(tmp_path):
    path = str(tmp_path / "a.arrow")
    write_store(path, [("139", 5, 5, np.array([[0, 0, 5, 5]]))], {"recipe": "x"})
    store = RegionStore.open(path)
    assert 139 in store and "139" in store
    assert store.rows([139]).tolist() == [0]
    assert store.boxes(139).tolist() == [[0, 0, 5, 5]]


@pytest.mark.parametrize("chunk_rows", [1, 3, 1000])
@pytest.mark.parametrize("bits", [0, 2])
def test_keys_with_the_same_hash_are_distinguished(tmp_path, monkeypatch, chunk_rows, bits):
    """64 bits never collide in a test, so hashes are truncated to one or four values."""
    full = store_module.key_hash
    for module in (store_module, writing):
        monkeypatch.setattr(module, "key_hash", lambda key: full(key) & ((1 << bits) - 1))
    monkeypatch.setattr(writing, "_CHUNK_ROWS", chunk_rows)
    rows = _rows(40)
    path = str(tmp_path / "a.arrow")
    write_store(path, rows, {"recipe": "x"})
    store = RegionStore.open(path)
    _check_against(store, rows)
    assert "other" not in store and store.rows(["other"]).tolist() == [-1]
    halves = [str(tmp_path / "0.arrow"), str(tmp_path / "1.arrow")]
    for i, half in enumerate(halves):
        write_store(half, rows[i::2], {"recipe": "x"})
    merged = merge_stores(halves, str(tmp_path / "m.arrow"), {"recipe": "x"})
    assert merged == store.manifest
    _check_against(RegionStore.open(str(tmp_path / "m.arrow")), rows)


def test_boxes_are_a_copy(tmp_path):
    path = str(tmp_path / "a.arrow")
    write_store(path, [("a", 9, 9, np.array([[1, 2, 3, 4]]))], {"recipe": "x"})
    store = RegionStore.open(path)
    store.boxes("a")[:] = 0
    assert store.boxes("a").tolist() == [[1, 2, 3, 4]]


def test_pickles_as_its_path_and_maps_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_store("a.arrow", _rows(200), {"recipe": "x"})
    data = pickle.dumps(RegionStore.open("a.arrow"))
    assert len(data) < 300
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # a worker may run in another folder
    _check_against(pickle.loads(data), _rows(200))


def test_opening_copies_nothing(tmp_path):
    path = str(tmp_path / "a.arrow")
    write_store(path, _rows(500), {"recipe": "x"})
    before = pa.total_allocated_bytes()
    store = RegionStore.open(path)
    assert pa.total_allocated_bytes() - before < 10_000
    for chunk in store.chunks:
        for array in (chunk.hashes, chunk.key_offsets, chunk.box_offsets, chunk.boxes):
            assert not array.flags.owndata and not array.flags.writeable


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(0, 60),
    owners=st.lists(st.integers(0, 3), min_size=60, max_size=60),
    chunk_rows=st.integers(1, 40),
)
def test_a_merge_does_not_depend_on_how_images_are_spread(tmp_path_factory, n, owners, chunk_rows):
    folder = tmp_path_factory.mktemp("merge")
    rows = _rows(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "_CHUNK_ROWS", chunk_rows)
        parts = []
        for owner in range(4):
            parts.append(str(folder / f"{owner}.arrow"))
            mine = [row for row, o in zip(rows, owners, strict=False) if o == owner]
            write_store(parts[-1], mine, {"recipe": "x"})
        whole = write_store(str(folder / "whole.arrow"), rows, {"recipe": "x"})
        merged = merge_stores(parts, str(folder / "merged.arrow"), {"recipe": "x"})
        again = merge_stores(parts[::-1], str(folder / "again.arrow"), {"recipe": "x"})
    assert merged == again
    several = n > chunk_rows * writing._MERGE_CHUNKS  # slices, each of which has its own chunks
    chunks = {"index_crc32", "boxes_crc32"} if several else ()
    assert all(merged[key] == value for key, value in whole.items() if key not in chunks)
    assert (folder / "merged.arrow").read_bytes() == (folder / "again.arrow").read_bytes()
    _check_against(RegionStore.open(str(folder / "merged.arrow")), rows)


def test_duplicate_keys_are_refused(tmp_path):
    rows = _rows(5)
    path = tmp_path / "a.arrow"
    with pytest.raises(UserError, match="'dir/3.jpg' appears twice"):
        write_store(str(path), [*rows, rows[3]], {"recipe": "x"})
    assert list(tmp_path.iterdir()) == []  # no unfinished file remains

    write_store(str(tmp_path / "0.arrow"), rows, {"recipe": "x"})
    write_store(str(tmp_path / "1.arrow"), rows[3:4], {"recipe": "x"})
    with pytest.raises(UserError, match="'dir/3.jpg' appears twice"):
        merge_stores([str(tmp_path / f"{i}.arrow") for i in range(2)], str(path), {"recipe": "x"})
    assert not path.exists()


@pytest.mark.parametrize(
    "box",
    [(0, 0, 11, 5), (0, 0, 5, 6), (-1, 0, 5, 5), (3, 0, 3, 5), (5, 0, 3, 5), (0, 0, np.nan, 5)],
)
def test_invalid_boxes_are_refused(tmp_path, box):
    path = str(tmp_path / "a.arrow")
    with pytest.raises(UserError, match="'cat.jpg' is 10x5.*XYXY"):
        write_store(path, [("cat.jpg", 10, 5, np.array([box]))], {"recipe": "x"})


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = str(tmp_path / "a.arrow")
    write_store(path, _rows(7), {"recipe": "old"})

    def full_disk(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing.os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        write_store(path, _rows(9), {"recipe": "new"})
    assert RegionStore.open(path).manifest["recipe"] == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.arrow"]


def test_missing_store(tmp_path):
    with pytest.raises(UserError, match=r"no region store .*x\.arrow.*region-pretrain regions"):
        RegionStore.open(str(tmp_path / "x.arrow"))
    with pytest.raises(UserError, match="no region store"):
        RegionStore.open(str(tmp_path))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.arrow"
    for content in (b"", b"ARROW1" + bytes(50), bytes(10_000)):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"x\.arrow is not a region store or is damaged"):
            RegionStore.open(str(path))
    path.write_bytes(b"{}")
    with pytest.raises(
        UserError, match=r"x\.arrow is not a region store, but another file: choose"
    ):
        RegionStore.open(str(path))
    with pa.ipc.new_file(str(path), pa.schema([("a", pa.int32())])) as writer:
        writer.write_batch(pa.record_batch({"a": pa.array([1], pa.int32())}))
    with pytest.raises(UserError, match="an Arrow file, but not a region store"):
        RegionStore.open(str(path))


def test_a_truncated_store_is_refused(tmp_path):
    path = tmp_path / "a.arrow"
    write_store(str(path), _rows(50), {"recipe": "x"})
    data = path.read_bytes()
    for part in np.linspace(0, len(data) - 1, 40).astype(int):
        path.write_bytes(data[:part])
        with pytest.raises(UserError, match=r"a\.arrow"):
            RegionStore.open(str(path))


def test_changed_bytes_are_refused_at_opening_or_found_by_verify(tmp_path):
    """A changed byte in the rows is always detected."""
    path = tmp_path / "a.arrow"
    write_store(str(path), _rows(50), {"recipe": "x"})
    RegionStore.open(str(path)).verify()
    data = bytearray(path.read_bytes())
    sound = data.index(np.float32(_rows(50)[8][3][0]).tobytes())
    changed = data.copy()
    changed[sound + 2] ^= 0x10
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"a\.arrow is damaged"):
        RegionStore.open(str(path)).verify()


def test_a_newer_format_is_refused_with_advice(tmp_path, monkeypatch):
    path = str(tmp_path / "a.arrow")
    monkeypatch.setattr(writing, "FORMAT_VERSION", 3)
    write_store(path, _rows(2), {"recipe": "x"})
    with pytest.raises(UserError, match="store format 3, but this version reads 2"):
        RegionStore.open(path)


_MEASURE = """
import re, sys, time
import numpy as np
from region_pretrain.regions import RegionStore

def private_megabytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024

before = private_megabytes()
start = time.process_time()  # without that of other processes
store = RegionStore.open(sys.argv[1])
opened = time.process_time() - start
keys = [f"n{i % 100:08d}/{i}.JPEG" for i in np.random.default_rng(0).integers(0, len(store), 20000)]
start = time.process_time()
for key in keys:
    store.boxes(key)
print(opened, private_megabytes() - before, len(keys) / (time.process_time() - start))
"""


def test_a_tenth_of_imagenet_opens_fast_in_little_memory_and_reads_fast(tmp_path):
    boxes = np.tile(np.array([[0, 0, 100, 100]], np.float32), (100, 1))
    parts = []
    for start in range(0, 128_000, 32_000):
        parts.append(str(tmp_path / f"{start}.arrow"))
        rows = ((f"n{i % 100:08d}/{i}.JPEG", 500, 375, boxes) for i in range(start, start + 32_000))
        write_store(parts[-1], rows, {"recipe": "x"})
    path = str(tmp_path / "all.arrow")
    assert merge_stores(parts, path, {"recipe": "x"})["boxes"] == 12_800_000
    command = [sys.executable, "-c", _MEASURE, path]
    best = [np.inf, np.inf, 0.0]
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:  # others may be using the machine
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        opened, megabytes, rate = map(float, output.split())
        best = [min(best[0], opened), min(best[1], megabytes), max(best[2], rate)]
        if best[0] < 2 and best[1] < 30 and best[2] > 10_000:
            break
    assert best[0] < 2 and best[1] < 30 and best[2] > 10_000
