"""Makes the region store of a data set: in parallel, in shards, and resumable."""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import cv2
import numpy as np
import torch
from tqdm import tqdm

from region_pretrain.errors import ProcessKilled, UserError, describe
from region_pretrain.files import is_disk_full
from region_pretrain.images import UnreadableImage, read_record, tolerated_files
from region_pretrain.lease import PREFIX, hold
from region_pretrain.progress import Progress, write_progress
from region_pretrain.regions.parts import ImageResult, Parts
from region_pretrain.regions.recipes import Recipe, get_recipe
from region_pretrain.regions.sources import ground_truth_boxes
from region_pretrain.regions.store import key_hash
from region_pretrain.regions.summary import Hits, count_hits
from region_pretrain.system import cores, one_opencv_thread, process_context

logger = logging.getLogger(__name__)

#: Adds to records, in their order, what the recipe reads.
Prepare = Callable[[Iterable[dict]], Iterator[dict]]
#: Key of a record: its pixels, if ``prepare`` has decoded them.
PIXELS = "pixels"
#: Key of a record: why ``prepare`` could not read its image.
UNREADABLE = "unreadable"

_PROGRESS_SECONDS = 1.0


def make_regions(
    records: Sequence[dict],
    out: str,
    recipe: str | Recipe,
    workers: int | None = None,
    shard: tuple[int, int] = (0, 1),
    max_unreadable: float = 0.01,
    part_size: int | None = None,
    prepare: Prepare | None = None,
) -> dict | None:
    """Make the regions of a data set and write them to a store.

    An interrupted run continues after the last complete part when it is started again; a finished
    store to whose data set images have been added is extended by them. While it
    works, ``<out>.parts/progress-<i>.json`` contains the progress of shard ``i``, in images
    (:mod:`region_pretrain.progress`). Unreadable files are listed in ``<out>.unreadable.txt`` and
    have no row in the store.

    Args:
        records: Detectron2 dicts with ``file_name`` and ``image_id``. If they have
            ``annotations``, the summary includes the recall and the precision of the boxes.
        out: path of the store, on a local or shared disk.
        recipe: a recipe or its id.
        workers: number of processes; by default one per available core.
        shard: ``(i, n)`` makes every ``n``-th part, starting with the ``i``-th, ``0 <= i < n``.
            Shards may run at the same time, on machines that share the disk. The last one to finish
            merges the parts.
        max_unreadable: largest fraction of the images that may be unreadable; at least one may,
            unless the fraction is 0.
        part_size: images per part, the unit of resumption; None: see
            :class:`~region_pretrain.regions.parts.Parts`.
        prepare: called with the records of each missing part, e.g. to run a detector.

    Returns:
        The summary, or ``None`` if parts of other shards are missing.

    Raises:
        UserError: too many unreadable images, ``out`` is something else, or it cannot be written.
    """
    if isinstance(recipe, str):
        recipe = get_recipe(recipe)
    workers = len(cores()) if workers is None else workers
    index, count = shard
    if workers < 1 or (part_size is not None and part_size < 1):
        raise UserError(f"workers={workers} and part_size={part_size} must be at least 1")
    if count < 1 or not 0 <= index < count:
        raise UserError(f"shard {index}/{count}: i/n needs 0 <= i < n")
    tolerated = tolerated_files(len(records), max_unreadable, "max_unreadable")
    if not records:
        raise UserError("there are no images to make regions for")
    if os.path.isdir(out):
        raise UserError(f"{out} is a folder; name a file, e.g. {out}/regions.arrow")

    with _write_errors(out):
        parts = Parts(records, out, recipe, part_size, count)
        return _make(parts, workers, shard, tolerated, prepare or iter)


def _make(
    parts: Parts, workers: int, shard: tuple[int, int], tolerated: int, prepare: Prepare
) -> dict | None:
    index, count = shard
    if (summary := parts.finished_summary()) is not None:
        return summary
    parts.claim_folder()
    mine = range(index, len(parts), count)
    todo = [part for part in mine if not parts.is_complete(part)]
    if len(todo) < len(mine):
        logger.info("Resuming: %d of %d parts are complete", len(mine) - len(todo), len(mine))
    if todo:
        total, left = (sum(len(parts.records_of(p)) for p in some) for some in (mine, todo))
        path = os.path.join(parts.folder, f"progress-{index}.json")
        progress = _ProgressFile(path, total - left, total)
        unreadable = 0
        with hold(parts.folder, f"{PREFIX}-{index}", f"shard {index} of {parts.out}"):
            for part, results in _run_parts(parts, todo, workers, progress.advance, prepare):
                unreadable += parts.write(part, results)
                if unreadable > tolerated:
                    break  # merge() raises the error
    return parts.merge(tolerated)


@contextlib.contextmanager
def _write_errors(out: str) -> Iterator[None]:
    """Report a full disk and files that cannot be written as a :class:`UserError`."""
    try:
        yield
    except OSError as error:
        full = is_disk_full(error)
        if not full and error.filename is None:
            raise
        reason = "no space left" if full else describe(error)
        raise UserError(
            f"cannot write {out}: {reason}; fix this and run again, finished parts are kept"
        ) from error


class _ProgressFile:
    """Keeps a shard's progress file up to date, at most about once per second.

    Args:
        path: the file.
        done: images in parts that were complete at the start.
        total: images of the shard.
    """

    def __init__(self, path: str, done: int, total: int) -> None:
        self.path, self.done, self.total = path, done, total
        self._done_before, self._started = done, time.monotonic()
        self._write(None)

    def advance(self) -> None:
        """Count one more image."""
        self.done += 1
        now = time.monotonic()
        if now - self._written >= _PROGRESS_SECONDS or self.done == self.total:
            per_image = (now - self._started) / (self.done - self._done_before)
            self._write(per_image * (self.total - self.done))

    def _write(self, seconds_left: float | None) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(FileNotFoundError):  # another run has merged all parts
            write_progress(self.path, Progress(self.done, self.total, seconds_left))


def _run_parts(
    parts: Parts,
    todo: Sequence[int],
    workers: int,
    after_image: Callable[[], None],
    prepare: Prepare,
) -> Iterator[tuple[int, list[ImageResult]]]:
    """Yield each part and its results; ``after_image`` is called once per image."""
    total = sum(len(parts.records_of(part)) for part in todo)
    # A network's batches within a part do not depend on which parts are missing.
    records = itertools.chain.from_iterable(prepare(parts.records_of(part)) for part in todo)
    # Looking ahead by two parts keeps the workers busy while one image takes long.
    results = _process_all(parts.recipe, records, workers, ahead=2 * parts.size)
    with tqdm(total=total, desc=parts.recipe.id, unit="img") as bar:
        for part in todo:
            done = []
            for result in itertools.islice(results, len(parts.records_of(part))):
                done.append(result)
                bar.update()
                after_image()
            yield part, done


def _process_all(
    recipe: Recipe, records: Iterable[dict], workers: int, ahead: int
) -> Iterator[ImageResult]:
    """Results in the order of the records; at most ``ahead`` images wait in the workers' queue."""
    if workers == 1:
        with one_opencv_thread():
            for record in records:
                yield _process(recipe, record)
        return

    queue: deque[Future[ImageResult]] = deque()
    executor = ProcessPoolExecutor(workers, mp_context=process_context(), initializer=_start_worker)
    try:
        # Workers are forked here, before the records' threads exist: a lock that one of them holds
        # would stay locked in a worker for ever.
        executor.submit(int)
        for record in records:
            queue.append(executor.submit(_process, recipe, record))
            while queue and (len(queue) > ahead or queue[0].done()):
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    except BrokenProcessPool as error:
        raise ProcessKilled(
            "a worker process was killed, possibly for lack of memory: run again with fewer "
            "workers or a working_size; finished parts are kept"
        ) from error
    finally:
        executor.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; the parent stops the workers
    cv2.setNumThreads(0)  # one image per process is faster than one image on all cores
    torch.set_num_threads(1)  # OpenMP's threads do not survive the fork
    parent = os.getppid()

    def follow_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)  # the parent was killed; an orphan would wait for work for ever

    threading.Thread(target=follow_parent, daemon=True).start()


def _process(recipe: Recipe, record: dict) -> ImageResult:
    key = str(record["image_id"])
    start = time.perf_counter()
    if UNREADABLE in record:
        return ImageResult(key, error=record[UNREADABLE])
    try:
        image = record[PIXELS] if PIXELS in record else read_record(record)
    except UnreadableImage as error:
        return ImageResult(key, error=describe(error))
    height, width = image.shape[:2]
    # The image's own generator: its boxes do not depend on its position in the data set.
    rng = np.random.default_rng([recipe.parameters.get("seed", 0), key_hash(key.encode())])
    try:
        found = recipe.run(image, record, rng)
    except UserError:
        raise
    except Exception as error:
        raise RuntimeError(f"{record['file_name']}: {recipe.id} failed: {error}") from error
    seconds = time.perf_counter() - start
    hits = Hits()
    if "annotations" in record:
        try:
            hits = count_hits(found.boxes, ground_truth_boxes(record, width, height))
        except UserError as error:  # recall is not worth ending the run
            logger.warning("Not counted in the recall: %s", error)
    boxes, *counts = found
    return ImageResult(key, width, height, boxes, seconds, hits, *counts)
