"""Making the regions of a data set: shards, resumption, refusals."""

from __future__ import annotations

import glob
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from detectron2.structures import BoxMode

from region_pretrain.errors import ProcessKilled, UserError
from region_pretrain.images import read_image, read_record
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.parts import Parts
from region_pretrain.regions.recipes import get_recipe
from region_pretrain.regions.summary import format_summary


def contents(path) -> dict:
    store = RegionStore.open(str(path))
    return {key: (store.size(key), store.boxes(key).tolist()) for key in store.keys()}


def test_each_image_has_the_boxes_of_the_recipe(tmp_path, records):
    out = tmp_path / "new" / "regions.arrow"
    summary = make_regions(records, str(out), "shapes-v1", workers=1, part_size=4)
    store = RegionStore.open(str(out))
    recipe = get_recipe("shapes-v1")
    expected = []
    for record in records:
        image = read_image(record["file_name"])
        boxes = recipe(image, record, np.random.default_rng(0))
        np.testing.assert_array_equal(store.boxes(record["image_id"]), boxes)
        assert store.size(record["image_id"]) == (image.shape[1], image.shape[0])
        expected.append(len(boxes))
    assert len(set(expected)) > 3  # the images have different boxes
    assert (summary["images"], summary["unreadable"]) == (11, 0)
    assert summary["boxes"] == sum(expected) == store.manifest["boxes"]
    assert summary["mean"] == pytest.approx(np.mean(expected))
    assert summary["median"] == np.median(expected)
    assert (summary["min"], summary["max"]) == (min(expected), max(expected))
    assert summary["without"] == expected.count(0)
    assert summary["seconds_per_image"] > 0
    assert store.manifest["recipe"] == "shapes-v1"
    assert store.manifest["parameters"]["min_side"] == 10
    assert "opencv" in store.manifest["versions"]
    store.verify()
    assert not os.path.exists(f"{out}.parts") and not os.path.exists(f"{out}.unreadable.txt")


@pytest.mark.parametrize("recipe", ["shapes-v1", "ccop-v1", "random-v1+min_side=8"])
def test_content_does_not_depend_on_workers_shards_parts_or_order(tmp_path, records, recipe):
    a, b, c = (str(tmp_path / f"{name}.arrow") for name in "abc")
    make_regions(records, a, recipe, workers=1)
    make_regions(records[::-1], b, recipe, workers=2, part_size=3)
    for index in (2, 0):
        assert make_regions(records, c, recipe, 1, (index, 3), part_size=2) is None
        assert not os.path.exists(c)
    assert make_regions(records, c, recipe, 1, (1, 3), part_size=2)["images"] == 11
    hashes = {RegionStore.open(path).manifest["sha256"] for path in (a, b, c)}
    assert len(hashes) == 1
    assert contents(a) == contents(b) == contents(c)


def test_a_shard_does_only_its_own_parts(tmp_path, records):
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, "grid-v1", 1, (1, 2), part_size=3)  # parts 0..3
    parts = {name for name in os.listdir(out + ".parts") if name.endswith(".arrow")}
    assert parts == {"part-000001.arrow", "part-000003.arrow"}
    keys = set(contents(f"{out}.parts/part-000003.arrow"))
    assert keys == {"im/9", "im/10"}


def test_every_shard_has_parts_of_a_small_data_set(tmp_path, records):
    """11 images are a single part of 1,000, and would be the work of the first of two shards."""
    out = str(tmp_path / "r.arrow")
    assert make_regions(records, out, "grid-v1", 1, (1, 2)) is None  # parts of 2 images
    parts = {name: len(contents(name)) for name in glob.glob(f"{out}.parts/*.arrow")}
    assert parts == {f"{out}.parts/part-{i:06d}.arrow": n for i, n in ((1, 2), (3, 2), (5, 1))}
    # Another number of shards continues with the same parts.
    assert make_regions(records, out, "grid-v1", 1, (0, 1))["images"] == 11
    plain = str(tmp_path / "plain.arrow")
    make_regions(records, plain, "grid-v1", 1)
    assert contents(out) == contents(plain)
    for shards, images, size in ((1, 9000, 1000), (16, 9000, 141), (16, 10**5, 1000), (9, 3, 1)):
        many = [{"image_id": i, "file_name": "x"} for i in range(images)]
        assert Parts(many, str(tmp_path / "n"), get_recipe("grid-v1"), None, shards).size == size


def test_random_boxes_depend_on_the_image_and_not_on_its_position(tmp_path, records):
    a, b = str(tmp_path / "a.arrow"), str(tmp_path / "b.arrow")
    make_regions(records, a, "random-v1+min_side=8", workers=1)
    make_regions(records[5:], b, "random-v1+min_side=8", workers=1)
    full, part = contents(a), contents(b)
    assert all(part[key] == full[key] for key in part) and len(part) == 6
    assert len({str(boxes) for _, boxes in full.values()}) == 11


def test_a_finished_store_is_not_made_again(tmp_path, records):
    out = tmp_path / "r.arrow"
    summary = make_regions(records, str(out), "grid-v1", workers=1)
    written = out.stat().st_mtime_ns
    assert make_regions(records, str(out), "grid-v1", workers=1) == summary
    assert out.stat().st_mtime_ns == written


def test_other_images_or_another_recipe_do_not_replace_a_store(tmp_path, records):
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, "grid-v1", workers=1)
    before = contents(out)
    with pytest.raises(UserError, match="recipe grid-v1, not .* recipe random-v1"):
        make_regions(records, out, "random-v1", workers=1)
    others = [record | {"image_id": f"other/{i}"} for i, record in enumerate(records[1:])]
    with pytest.raises(UserError, match="regions of 11 images, none of them among these 10 images"):
        make_regions(others, out, "grid-v1", workers=1)
    assert contents(out) == before


def test_other_files_under_the_same_keys_do_not_get_the_regions(tmp_path, records):
    """Two data sets whose image ids are 1, 2, 3, or whose files have the same names."""
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, "grid-v1", workers=1)
    others = []
    for record in records:
        path = tmp_path / f"other_{os.path.basename(record['file_name'])}"
        path.write_bytes(Path(record["file_name"]).read_bytes() + b"\0")  # decodes to the same
        others.append(record | {"file_name": str(path)})
    with pytest.raises(UserError, match="regions of other files with the same keys, e.g. "):
        make_regions(others, out, "grid-v1", workers=1)
    for record, other in zip(records, others, strict=True):
        os.replace(record["file_name"], other["file_name"])  # the same files, moved
    assert make_regions(others, out, "grid-v1", workers=1)["images"] == len(records)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"recipe": "grid-v1+overlap=0"}, r"its recipe is grid-v1, this run's is grid-v1\+overl"),
        ({"part_size": 5}, "its part_size is 4, this run's is 5"),
        ({"drop": 1}, r"of other images \(11 then, 10 now\): put removed ones back"),
        ({"rename": True}, r"of other images \(11 then, 11 now\)"),
    ],
)
def test_parts_of_another_run_are_refused(tmp_path, records, change, message):
    out = str(tmp_path / "r.arrow")
    make_regions(records, out, "grid-v1", 1, (0, 2), part_size=4)
    if "rename" in change:
        records[3]["image_id"] = "another"
    records = records[change.get("drop", 0) :]
    with pytest.raises(UserError, match=message):
        make_regions(
            records,
            out,
            change.get("recipe", "grid-v1"),
            workers=1,
            part_size=change.get("part_size", 4),
        )


def test_unreadable_images_are_listed_and_left_out(tmp_path, records):
    with open(records[2]["file_name"], "wb") as file:
        file.write(b"not an image")
    os.remove(records[9]["file_name"])
    out = str(tmp_path / "r.arrow")
    summary = make_regions(records, out, "grid-v1", workers=2, part_size=4, max_unreadable=0.2)
    assert (summary["images"], summary["unreadable"]) == (9, 2)
    store = RegionStore.open(out)
    rows = store.rows([record["image_id"] for record in records])
    assert np.flatnonzero(rows < 0).tolist() == [2, 9]
    lines = open(out + ".unreadable.txt").read().splitlines()
    assert [line.split("\t")[0] for line in lines] == ["im/2", "im/9"]
    assert records[2]["file_name"] in lines[0] and "no such file" in lines[1]


def test_too_many_unreadable_images_stop_the_run_before_a_store_is_written(tmp_path, records):
    for i in (0, 1):
        open(records[i]["file_name"], "wb").close()
    out = str(tmp_path / "r.arrow")
    with pytest.raises(UserError, match=r"2 of 11 images cannot be read, more than the 1 that are"):
        make_regions(records, out, "grid-v1", workers=1, part_size=2, max_unreadable=0.1)
    assert not os.path.exists(out)
    assert os.path.exists(out + ".unreadable.txt")
    # It stopped at the first part, and continues when more are allowed.
    assert os.path.exists(out + ".parts/part-000000.arrow")
    assert not os.path.exists(out + ".parts/part-000001.arrow")
    summary = make_regions(records, out, "grid-v1", workers=1, part_size=2, max_unreadable=0.2)
    assert (summary["images"], summary["unreadable"]) == (9, 2)


def test_a_killed_run_is_resumed(tmp_path, records, monkeypatch):
    out = str(tmp_path / "r.arrow")
    reference = str(tmp_path / "reference.arrow")
    make_regions(records, reference, "shapes-v1", workers=1)
    script = (
        "import json, sys, time\n"
        "from region_pretrain.regions import generate\n"
        "process, records = generate._process, json.load(sys.stdin)\n"
        "def slow(recipe, record):\n"
        "    if record in records[6:]: time.sleep(600)  # until it is killed\n"
        "    return process(recipe, record)\n"
        "generate._process = slow\n"
        "generate.make_regions(records, sys.argv[1], 'shapes-v1', 2, part_size=2)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, out], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    process.stdin.write(json.dumps(records).encode())
    process.stdin.close()
    first = out + ".parts/part-000001.arrow"
    deadline = time.monotonic() + 600
    while not os.path.exists(first):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    assert len(children) == 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not os.path.exists(out)
    while any(_is_running(pid) for pid in children):  # the workers exit with their parent
        assert time.monotonic() < deadline
        time.sleep(0.05)

    finished = [i for i in range(11) if os.path.exists(f"{out}.parts/part-{i // 2:06d}.arrow")]
    assert 4 <= len(finished) < 11
    read = []
    monkeypatch.setattr(
        "region_pretrain.regions.generate.read_record",
        lambda record: read.append(record["file_name"]) or read_record(record),
    )
    assert make_regions(records, out, "shapes-v1", 1, part_size=2)["images"] == 11
    assert read == [r["file_name"] for i, r in enumerate(records) if i not in finished]
    assert contents(out) == contents(reference)
    assert not os.path.exists(out + ".parts")


def _is_running(pid: str) -> bool:
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_killed_worker_ends_the_run_with_advice(tmp_path, records, monkeypatch):
    monkeypatch.setattr("region_pretrain.regions.generate.read_record", _die)
    with pytest.raises(ProcessKilled, match="worker process was killed.*fewer workers"):
        make_regions(records, str(tmp_path / "r.arrow"), "grid-v1", workers=2)


def _die(record):
    os.kill(os.getpid(), signal.SIGKILL)


def test_recall_of_annotated_objects(tmp_path, records):
    # 100x90; cells of 2x2 are 50x45.
    record = dict(records[0], annotations=[])
    for bbox, crowd in (
        ([0, 0, 50, 45], 0),  # a cell: IoU 1
        ([0, 0, 30, 45], 0),  # IoU 0.6 with it
        ([0, 0, 10, 9], 0),  # IoU 0.04
        ([50, 45, 50, 45], 1),  # crowds do not count
    ):
        annotation = {"bbox": bbox, "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": crowd}
        record["annotations"].append(annotation)
    summary = make_regions(
        [record], str(tmp_path / "r.arrow"), "grid-v1+divisions=2+overlap=0", workers=1
    )
    assert summary["boxes"] == 4
    assert summary["objects"] == 3
    assert summary["recall@0.5"] == pytest.approx(2 / 3)
    assert summary["recall@0.7"] == pytest.approx(1 / 3)
    assert format_summary(summary).endswith(
        "recall: 0.667 at IoU 0.5, 0.333 at IoU 0.7, of 3 annotated objects\n"
        "precision: 0.250 of the boxes have an IoU of 0.5 or more with an annotated object"
    )
    assert summary["precision@0.5"] == 1 / 4  # the crowd's cell does not count


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers"),
        ({"part_size": 0}, "part_size"),
        ({"shard": (2, 2)}, "0 <= i < n"),
        ({"shard": (-1, 2)}, "0 <= i < n"),
        ({"max_unreadable": 2}, "max_unreadable"),
        ({"recipe": "nonsense"}, "no recipe"),
        ({"records": []}, "no images"),
    ],
)
def test_invalid_arguments_are_refused(tmp_path, records, arguments, message):
    arguments = {"records": records, "recipe": "grid-v1", "workers": 1, **arguments}
    with pytest.raises(UserError, match=message):
        make_regions(out=str(tmp_path / "r.arrow"), **arguments)
    assert os.listdir(tmp_path) == ["images"]


def test_an_output_that_is_a_folder_or_another_file_is_refused(tmp_path, records):
    with pytest.raises(UserError, match="is a folder"):
        make_regions(records, str(tmp_path), "grid-v1", workers=1)
    (tmp_path / "text").write_text("precious")
    with pytest.raises(UserError, match="text is not a region store"):
        make_regions(records, str(tmp_path / "text"), "grid-v1", workers=1)
    assert (tmp_path / "text").read_text() == "precious"


def test_a_fixed_file_is_read_again_and_the_other_parts_are_kept(tmp_path, records):
    whole = open(records[2]["file_name"], "rb").read()
    for i in (2, 9):
        open(records[i]["file_name"], "wb").close()
    out = str(tmp_path / "r.arrow")
    with pytest.raises(UserError, match="2 of 11 images cannot be read"):
        make_regions(records, out, "grid-v1", workers=1, part_size=2, max_unreadable=0.1)
    first, last = (out + f".parts/part-00000{i}.arrow" for i in (0, 4))
    untouched = os.stat(first).st_mtime_ns, os.stat(last).st_mtime_ns
    with open(records[2]["file_name"], "wb") as file:
        file.write(whole)
    summary = make_regions(records, out, "grid-v1", 1, (1, 3), part_size=2, max_unreadable=0.1)
    assert summary is None  # this shard has parts 1 and 4; part 5 is not made yet
    assert untouched == (os.stat(first).st_mtime_ns, os.stat(last).st_mtime_ns)
    summary = make_regions(records, out, "grid-v1", 1, part_size=2, max_unreadable=0.1)
    assert (summary["images"], summary["unreadable"]) == (10, 1)
    assert "im/2" in RegionStore.open(out)
    assert open(out + ".unreadable.txt").read().startswith("im/9\t")


def test_the_list_of_unreadable_files_is_removed_when_all_are_fixed(tmp_path, records):
    whole = open(records[4]["file_name"], "rb").read()
    open(records[4]["file_name"], "wb").close()
    out = str(tmp_path / "r.arrow")
    with pytest.raises(UserError, match="1 of 11"):
        make_regions(records, out, "grid-v1", workers=1, max_unreadable=0)
    assert os.path.exists(out + ".unreadable.txt")
    with open(records[4]["file_name"], "wb") as file:
        file.write(whole)
    assert make_regions(records, out, "grid-v1", workers=1, max_unreadable=0)["images"] == 11
    assert not os.path.exists(out + ".unreadable.txt")


def test_files_that_are_fixed_extend_a_finished_store(tmp_path, records):
    whole = open(records[4]["file_name"], "rb").read()
    for i in (4, 5):
        open(records[i]["file_name"], "wb").close()
    out = str(tmp_path / "r.arrow")
    first = make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.2)
    assert (first["images"], first["unreadable"]) == (9, 2)
    before = os.stat(out).st_mtime_ns
    assert make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.2) == first
    assert os.stat(out).st_mtime_ns == before
    with open(records[4]["file_name"], "wb") as file:
        file.write(whole)
    again = make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.2)
    assert (again["images"], again["unreadable"]) == (10, 1)
    assert open(out + ".unreadable.txt").read().startswith("im/5\t")
    assert make_regions(records, out, "grid-v1", workers=1, max_unreadable=0.2) == again
    assert not os.path.exists(out + ".parts")


def test_two_images_with_one_key_are_refused_at_the_start(tmp_path, records):
    records[7]["image_id"] = records[1]["image_id"]
    with pytest.raises(UserError, match="image 'im/1' appears twice"):
        make_regions(records, str(tmp_path / "r.arrow"), "grid-v1", workers=1)
    assert os.listdir(tmp_path) == ["images"]


def test_annotations_of_another_size_are_left_out_of_the_recall(tmp_path, records, caplog):
    annotation = {"bbox": [0, 0, 50, 45], "bbox_mode": BoxMode.XYWH_ABS}
    for record in records[:2]:
        record["annotations"] = [annotation]
    records[1].update(width=90, height=105)  # e.g. rotated by EXIF
    recipe = "grid-v1+divisions=2+overlap=0"
    summary = make_regions(records, str(tmp_path / "r.arrow"), recipe, workers=1)
    assert summary["images"] == 11
    assert (summary["objects"], summary["recall@0.5"]) == (1, 1.0)
    assert records[1]["file_name"] in caplog.text


def test_annotations_without_a_box_are_left_out_of_the_recall(tmp_path, records, caplog):
    records[0]["annotations"] = [{"segmentation": [[1, 1, 9, 1, 9, 9]], "category_id": 0}]
    summary = make_regions(records, str(tmp_path / "r.arrow"), "grid-v1", workers=1)
    assert summary["images"] == 11 and summary.get("objects", 0) == 0
    assert f"{records[0]['file_name']}: an annotation has no bbox" in caplog.text


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failing_search_names_the_image(tmp_path, records, monkeypatch, workers):
    def search(image, mode, working_size):
        raise ValueError("out of its depth")

    monkeypatch.setattr("region_pretrain.regions.recipes.selective_search", search)
    with pytest.raises(RuntimeError, match=r"00\.png: soco-v1 failed: out of its depth"):
        make_regions(records, str(tmp_path / "r.arrow"), "soco-v1", workers=workers)
