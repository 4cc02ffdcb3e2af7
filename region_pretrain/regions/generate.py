"""Makes the region store of a data set: in parallel, in shards, and on from where it stopped.

Images are worked through in parts of a fixed number of records. A part is a small file that
appears when it is complete, in the folder ``<out>.parts``; whoever finds all of them there puts
them together. The parts' contents depend on the recipe and on the images alone.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

import cv2
import numpy as np
import torch
from iopath.common.file_io import file_lock
from torchvision.ops import box_iou
from tqdm import tqdm

from region_pretrain.errors import UserError
from region_pretrain.files import write_text_atomic
from region_pretrain.images import UnreadableImage, read_image
from region_pretrain.regions.recipes import Recipe, get_recipe
from region_pretrain.regions.sources import ground_truth_boxes
from region_pretrain.regions.store import RegionStore, key_hash
from region_pretrain.regions.writing import merge_stores, write_store

logger = logging.getLogger(__name__)

_RECALL_IOUS = (0.5, 0.7)


class _Result(NamedTuple):
    """What became of one image; ``error`` in place of boxes if it could not be read."""

    key: str
    width: int = 0
    height: int = 0
    boxes: np.ndarray | None = None
    seconds: float = 0.0
    objects: int = 0
    found: tuple[int, ...] = (0,) * len(_RECALL_IOUS)
    error: str = ""


def count_found(boxes: np.ndarray, objects: np.ndarray, iou: float) -> int:
    """How many of the objects some box covers with at least this IoU.

    Args:
        boxes: ``(N, 4)`` XYXY.
        objects: ``(M, 4)`` XYXY.
        iou: the threshold.
    """
    if not len(boxes) or not len(objects):
        return 0
    ious = box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(objects).double())
    return int((ious.amax(dim=0) >= iou).sum())


def _process(recipe: Recipe, record: dict) -> _Result:
    key = str(record["image_id"])
    start = time.perf_counter()
    try:
        image = read_image(record["file_name"])
    except UnreadableImage as error:
        return _Result(key, error=" ".join(str(error).split()))
    height, width = image.shape[:2]
    # An image's own generator: its boxes do not depend on its place among the others.
    rng = np.random.default_rng([recipe.parameters.get("seed", 0), key_hash(key.encode())])
    try:
        boxes = recipe(image, record, rng)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"{record['file_name']}: {recipe.id} failed on it: {error}") from error
    seconds = time.perf_counter() - start
    objects = boxes[:0]
    if "annotations" in record:
        try:
            objects = ground_truth_boxes(record, width, height)
        except UserError as error:  # no reason to end a run for the sake of its recall
            logger.warning("left out of the recall: %s", error)
    found = tuple(count_found(boxes, objects, iou) for iou in _RECALL_IOUS)
    return _Result(key, width, height, boxes, seconds, len(objects), found)


def _start_worker() -> None:
    cv2.setNumThreads(0)  # one image a process is faster than one image on all cores
    torch.set_num_threads(1)  # and OpenMP's threads do not survive the fork
    parent = os.getppid()

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed: an orphan would wait for work for ever

    threading.Thread(target=follow_parent, daemon=True).start()


class _Plan:
    """Which images go into which part, and whose parts lie in the folder."""

    def __init__(self, records: Sequence[dict], out: str, recipe: Recipe, part_size: int) -> None:
        self.out, self.recipe, self.records, self.part_size = out, recipe, records, part_size
        self.folder = f"{out}.parts"
        self.num_parts = -(-len(records) // part_size)
        names, keys = hashlib.sha256(), set()
        for record in records:
            key = str(record["image_id"]).encode()
            names.update(len(key).to_bytes(8, "little") + key)
            if key in keys:
                raise UserError(
                    f"image {key.decode()!r} comes twice: regions are kept by image_id, so it must "
                    "be unique"
                )
            keys.add(key)
        self.facts = {
            "recipe": recipe.id,
            "images": len(records),
            "image_list": names.hexdigest(),
            "part_size": part_size,
            "opencv": cv2.__version__,
        }

    def part_file(self, part: int) -> str:
        return os.path.join(self.folder, f"part-{part:06d}.arrow")

    def has_part(self, part: int) -> bool:
        """Whether a part is complete; not if a file that could not be read was mended since."""
        if not os.path.exists(self.part_file(part)):
            return False
        unreadable = RegionStore.open(self.part_file(part)).manifest["unreadable"]
        keys = {key for key, _ in unreadable}
        for record in self.part_records(part) if keys else ():
            if str(record["image_id"]) in keys:
                try:
                    read_image(record["file_name"])
                    return False
                except UnreadableImage:
                    pass
        return True

    def part_records(self, part: int) -> Sequence[dict]:
        return self.records[part * self.part_size : (part + 1) * self.part_size]

    def check_folder(self) -> None:
        """Claim the folder for this plan, or refuse it if it holds the parts of another."""
        path = os.path.join(self.folder, "plan.json")
        os.makedirs(self.folder, exist_ok=True)
        with file_lock(path):
            if not os.path.isfile(path):
                write_text_atomic(path, json.dumps(self.facts))
                return
            with open(path) as file:
                facts = json.load(file)
        for key, value in self.facts.items():
            if facts.get(key) != value:
                raise UserError(
                    f"{self.folder} holds unfinished regions of another run: its {key} is "
                    f"{facts.get(key)}, this run's is {value}; go on with the same settings, "
                    "delete that folder, or choose another output file"
                )

    def is_finished(self) -> bool:
        """Whether the store is there already; refuses to replace one of another plan."""
        if not os.path.exists(self.out):
            return False
        manifest = RegionStore.open(self.out).manifest
        if manifest["recipe"] != self.recipe.id or manifest.get("image_list") != (
            self.facts["image_list"]
        ):
            raise UserError(
                f"{self.out} exists: regions of {manifest['images']} images with recipe "
                f"{manifest['recipe']}, not of these {len(self.records)} images with recipe "
                f"{self.recipe.id}; delete it or choose another output file"
            )
        return True


def _write_part(plan: _Plan, part: int, results: list[_Result]) -> int:
    """Write a part, itself a store; returns the number of images that could not be read."""
    good = [r for r in results if not r.error]
    facts = {
        "recipe": plan.recipe.id,
        "unreadable": [(r.key, r.error) for r in results if r.error],
        "seconds": sum(r.seconds for r in good),
        "objects": sum(r.objects for r in good),
        "found": [sum(r.found[i] for r in good) for i in range(len(_RECALL_IOUS))],
    }
    write_store(plan.part_file(part), ((r.key, r.width, r.height, r.boxes) for r in good), facts)
    return len(facts["unreadable"])


def _run_parts(plan: _Plan, parts: Sequence[int], workers: int) -> Iterator[tuple[int, list]]:
    """Results part by part; the next part's images are queued before a part is waited for."""
    bar = tqdm(total=sum(len(plan.part_records(p)) for p in parts), desc=plan.recipe.id, unit="img")
    if workers == 1:
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        try:
            for part in parts:
                results = []
                for record in plan.part_records(part):
                    results.append(_process(plan.recipe, record))
                    bar.update()
                yield part, results
        finally:
            cv2.setNumThreads(threads)
            bar.close()
        return

    queued: deque[tuple[int, list[Future]]] = deque()
    waiting = deque(parts)
    context = multiprocessing.get_context("fork")
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)
    try:
        while queued or waiting:
            while waiting and len(queued) < 2:
                part = waiting.popleft()
                futures = [
                    executor.submit(_process, plan.recipe, r) for r in plan.part_records(part)
                ]
                queued.append((part, futures))
            part, futures = queued.popleft()
            results = []
            for future in futures:
                results.append(future.result())
                bar.update()
            yield part, results
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run again with fewer "
            "workers or a working_size; finished parts are kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        bar.close()


def make_regions(
    records: Sequence[dict],
    out: str,
    recipe: str | Recipe,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    max_unreadable: float = 0.01,
    part_size: int = 1000,
) -> dict | None:
    """Make the regions of a data set and write them to a store.

    Run again after an interruption it goes on behind the last complete part. Files that cannot be
    read are listed in ``<out>.unreadable.txt`` and have no row in the store.

    Args:
        records: Detectron2 dicts with ``file_name`` and ``image_id``; where they have
            ``annotations`` the summary has the recall of the boxes.
        out: the store's path, on a local or shared disk.
        recipe: a recipe, its name or its id.
        workers: processes; default one a core that this process may use.
        shard: ``(i, n)``: make only every ``n``-th part, from the ``i``-th on, ``0 <= i < n``. The
            shards may run at once, on machines that share the disk; the last puts all together.
        max_unreadable: share of the images that may be unreadable.
        part_size: images in a part.

    Returns:
        The summary, or ``None`` if parts of other shards are still missing.

    Raises:
        UserError: too many unreadable images, or ``out`` holds something else.
    """
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    workers = len(os.sched_getaffinity(0)) if workers is None else workers
    index, count = shard
    if workers < 1 or part_size < 1:
        raise UserError(f"workers and part_size must be at least 1: {workers}, {part_size}")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"shard i/n needs 0 <= i < n, not {index}/{count}")
    if not 0 <= max_unreadable <= 1:
        raise UserError(f"max_unreadable is a share from 0 to 1, not {max_unreadable}")
    if not records:
        raise UserError("there are no images to make regions of")
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder; name the file to write, e.g. {out}/regions.arrow")

    plan = _Plan(records, out, recipe, part_size)
    if plan.is_finished():
        return RegionStore.open(out).manifest["summary"]
    plan.check_folder()
    todo = [p for p in range(index, plan.num_parts, count) if not plan.has_part(p)]
    done = len(range(index, plan.num_parts, count)) - len(todo)
    if done:
        logger.info("going on: %d parts of this shard are complete", done)
    unreadable = 0
    for part, results in _run_parts(plan, todo, workers) if todo else ():
        unreadable += _write_part(plan, part, results)
        if unreadable > max_unreadable * len(records):
            break  # no use in going on; the merge below says why
    return _merge(plan, max_unreadable)


def _merge(plan: _Plan, max_unreadable: float) -> dict | None:
    """Put the parts together if all are there; the summary then."""
    with file_lock(plan.out):
        if plan.is_finished():  # another shard was faster
            return RegionStore.open(plan.out).manifest["summary"]
        there = [p for p in range(plan.num_parts) if os.path.exists(plan.part_file(p))]
        facts, counts = [], []
        for part in there:  # one at a time: there are more parts than file handles
            store = RegionStore.open(plan.part_file(part))
            facts.append(store.manifest)
            counts.append(store.counts())
        unreadable = [tuple(pair) for part in facts for pair in part["unreadable"]]
        listing = f"{plan.out}.unreadable.txt"
        if unreadable:
            text = "".join(f"{key}\t{error}\n" for key, error in unreadable)
            write_text_atomic(listing, text)
        elif os.path.exists(listing):
            os.remove(listing)  # of an earlier run: they were mended since
        if len(unreadable) > max_unreadable * len(plan.records):
            raise UserError(
                f"{len(unreadable)} of {len(plan.records)} images cannot be read, more than the "
                f"share of {max_unreadable:g} that is allowed: see {listing}; mend them or allow "
                "more (max_unreadable), and run again: finished parts are kept"
            )
        if len(there) < plan.num_parts:
            logger.info(
                "%d of %d parts are complete; the shard that completes the last one puts them "
                "together",
                len(there),
                plan.num_parts,
            )
            return None
        summary = _summarise(facts, np.concatenate(counts), len(unreadable))
        manifest = {
            "recipe": plan.recipe.id,
            "parameters": plan.recipe.parameters,
            "image_list": plan.facts["image_list"],
            "summary": summary,
        }
        merge_stores([plan.part_file(p) for p in there], plan.out, manifest)
        shutil.rmtree(plan.folder, ignore_errors=True)
    return summary


def _summarise(facts: list[dict], counts: np.ndarray, unreadable: int) -> dict:
    summary = {"images": len(counts), "unreadable": unreadable, "boxes": int(counts.sum())}
    if len(counts):
        summary |= {
            "mean": float(counts.mean()),
            "median": float(np.median(counts)),
            "min": int(counts.min()),
            "max": int(counts.max()),
            "without": int((counts == 0).sum()),
            "seconds_per_image": sum(f["seconds"] for f in facts) / len(counts),
        }
    objects = sum(f["objects"] for f in facts)
    if objects:
        summary["objects"] = objects
        for i, iou in enumerate(_RECALL_IOUS):
            summary[f"recall@{iou:g}"] = sum(f["found"][i] for f in facts) / objects
    return summary


def format_summary(summary: dict) -> str:
    """A summary in a few lines for people."""
    lines = [
        f"{summary['images']} images, {summary['unreadable']} unreadable, {summary['boxes']} boxes"
    ]
    if "mean" in summary:
        lines.append(
            "boxes an image: mean {mean:.1f}, median {median:g}, min {min}, max {max}; "
            "{without} images without any; {seconds_per_image:.3f} s an image and process".format(
                **summary
            )
        )
    if "objects" in summary:
        recalls = ", ".join(f"{summary[f'recall@{i:g}']:.3f} at IoU {i:g}" for i in _RECALL_IOUS)
        lines.append(f"recall of {summary['objects']} annotated objects: {recalls}")
    return "\n".join(lines)
