"""The parts of an unfinished region store: small files that one or more shards write.

The images are split into parts of a fixed number of records. A part is a file in the folder
``<out>.parts`` that appears when it is complete; when all parts exist, they are merged into the
store. A part's content depends on the recipe and the images alone. If the store exists and images
have been added since, the parts are those of the new images, and the store is extended by them.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Sequence
from typing import Any, NamedTuple

import cv2
import numpy as np

from region_pretrain.errors import UserError, first_few
from region_pretrain.files import locked, printable, remove_parts, write_text_atomic
from region_pretrain.images import readings_of
from region_pretrain.regions.images import changed_files, digest_of_keys, file_sizes, readable
from region_pretrain.regions.recipes import Recipe
from region_pretrain.regions.store import RegionStore
from region_pretrain.regions.summary import Hits, as_part, summarise
from region_pretrain.regions.writing import merge_stores, write_store

logger = logging.getLogger(__name__)

#: Name of the file in the folder of parts that describes them.
PLAN = "plan.json"
_COUNTS = ("given", "dropped", "clipped")
_SIZE, _PARTS_PER_SHARD = 1000, 4  # images, if there is one shard; parts, if there are several
_SAMPLE = 64  # images whose file sizes are compared with those of a later run


class ImageResult(NamedTuple):
    """The regions of one image.

    Attributes:
        key: the image's key.
        width, height: size of the image in pixels.
        boxes: ``(N, 4)`` float32 XYXY.
        seconds: time that it took.
        hits: comparison with the annotated objects; empty for an image without annotations.
        given, dropped, clipped: see :class:`~region_pretrain.regions.recipes.Found`.
        error: why the image is unreadable; all fields but ``key`` are then unset.
    """

    key: str
    width: int = 0
    height: int = 0
    boxes: np.ndarray | None = None
    seconds: float = 0.0
    hits: Hits = Hits()
    given: int = 0
    dropped: int = 0
    clipped: int = 0
    error: str = ""


class Parts:
    """The parts of one store.

    Args:
        records: Detectron2 dicts of all images.
        out: path of the store; if it exists, only images that it lacks are split into parts.
        recipe: the recipe.
        size: images per part; None: that of an unfinished run, otherwise 1,000, or fewer so that
            each shard has four parts.
        shards: between how many the parts are shared.

    Attributes:
        records: the images that the store lacks; none if they were unreadable and still are.

    Raises:
        UserError: two images have the same ``image_id``; ``out`` contains regions of another recipe
            or none of these images.
    """

    def __init__(
        self, records: Sequence[dict], out: str, recipe: Recipe, size: int | None, shards: int = 1
    ) -> None:
        self.out, self.recipe = out, recipe
        self.folder = f"{out}.parts"
        keys = set()
        for record in records:
            key = str(record["image_id"])
            if key in keys:
                raise UserError(
                    f"image {key!r} appears twice: image_id is the key of an image's regions and "
                    "must be unique"
                )
            keys.add(key)
        self._total = len(records)
        self._image_list = digest_of_keys(records)
        self._reading = readings_of(records)
        self._sizes = file_sizes(records[:: -(-len(records) // _SAMPLE) or 1])
        self._base = self._existing()
        self._refuse_other_files(records)
        self._before = self._base and _content(self._base)
        self.records = self._without_regions(records)
        self.size = size or self._usual_size(shards)
        self._plan = {
            "recipe": recipe.id,
            "images": len(self.records),
            "image_list": self._image_list,
            "part_size": self.size,
            "opencv": cv2.__version__,
            "reading": self._reading,
        }

    def __len__(self) -> int:
        return -(-len(self.records) // self.size)

    def _usual_size(self, shards: int) -> int:
        found = (self._found_plan() or {}).get("part_size")
        if isinstance(found, int) and found > 0:
            return found
        enough = -(-len(self.records) // (_PARTS_PER_SHARD * shards))
        return _SIZE if shards == 1 else max(1, min(_SIZE, enough))

    def records_of(self, part: int) -> Sequence[dict]:
        """The images of a part."""
        return self.records[part * self.size : (part + 1) * self.size]

    def path(self, part: int) -> str:
        """The file of a part."""
        return os.path.join(self.folder, f"part-{part:06d}.arrow")

    def is_complete(self, part: int) -> bool:
        """Whether a part exists, is intact, and none of its unreadable files has been fixed."""
        store = self._open(part)
        if store is None:
            return False
        unreadable = dict(store.manifest["unreadable"])
        records = self.records_of(part) if unreadable else ()
        return not any(str(r["image_id"]) in unreadable and readable(r) for r in records)

    def _open(self, part: int) -> RegionStore | None:
        """A part; None if it is missing, or, with a warning, damaged or of another run."""
        path = self.path(part)
        if not os.path.exists(path):
            return None
        try:
            store = RegionStore.open(path)
            store.verify()
            for fact, value in self._facts(part).items():
                if store.manifest.get(fact) != value:
                    raise UserError(f"{path} has another {fact} than this run")
            if store.manifest["versions"].get("opencv") != cv2.__version__:
                raise UserError(f"{path} was made with another version of OpenCV")
        except UserError as error:
            logger.warning("Not used, this part is made again: %s", error)
            return None
        return store

    def _facts(self, part: int) -> dict[str, str]:
        """What a part must have in its manifest."""
        return {
            "recipe": self.recipe.id,
            "image_list": digest_of_keys(self.records_of(part)),
            "reading": self._reading,
        }

    def claim_folder(self) -> None:
        """Create the folder of parts, and remove what killed runs left unfinished.

        Raises:
            UserError: the folder contains parts of other images or settings.
        """
        path = self._plan_path()
        os.makedirs(self.folder, exist_ok=True)
        out_folder, name = os.path.split(os.path.abspath(self.out))
        remove_parts(out_folder, name, shared=True)
        remove_parts(self.folder, shared=True)
        with locked(path):
            found = self._found_plan()
            if found is None:  # also if it is damaged: each part has its own digest
                write_text_atomic(path, json.dumps(self._plan))
                return
        for key, value in self._plan.items():
            if found.get(key) != value and key.startswith("image"):
                raise UserError(
                    f"{self.folder} contains unfinished regions of other images "
                    f"({found.get('images')} then, {len(self.records)} now): put removed ones back "
                    "and new ones aside until the search has finished, or delete that folder"
                )
            if found.get(key) != value:
                raise UserError(
                    f"{self.folder} contains unfinished regions of another run: its {key} is "
                    f"{found.get(key)}, this run's is {value}; continue with the same settings, "
                    "delete that folder, or choose another output file"
                )

    def _plan_path(self) -> str:
        return os.path.join(self.folder, PLAN)

    def _found_plan(self) -> dict[str, Any] | None:
        """The plan in the folder; None if it is missing or damaged."""
        try:
            with open(self._plan_path(), "rb") as file:
                found = json.load(file)
        except (OSError, ValueError, RecursionError):
            return None
        return found if isinstance(found, dict) else None

    def _existing(self) -> RegionStore | None:
        """The store if it exists already; refuses one of another recipe."""
        if not os.path.exists(self.out):
            return None
        store = RegionStore.open(self.out)
        if store.manifest["recipe"] != self.recipe.id:
            raise UserError(
                f"{self.out} exists: regions of {len(store)} images with recipe "
                f"{store.manifest['recipe']}, not with recipe {self.recipe.id}; delete it or "
                "choose another output file"
            )
        if not isinstance(store.manifest.get("summary"), dict):
            raise UserError(f"{self.out} exists, but has no summary; choose another output file")
        reading = store.manifest.get("reading", self._reading)
        if reading != self._reading:
            raise UserError(
                f"{self.out} exists: regions of images read with {reading or 'no options'}, not "
                f"with {self._reading or 'no options'}; delete it or choose another output file"
            )
        return store

    def _refuse_other_files(self, records: Sequence[dict]) -> None:
        """Refuse a store of another data set whose images have the same keys, e.g. 1, 2, 3."""
        changed, _ = changed_files(self._base, records) if self._base else ([], 0)
        if changed:
            raise UserError(
                f"{self.out} exists: regions of other files with the same keys, e.g. {changed[0]}; "
                "delete it or choose another output file"
            )

    def _without_regions(self, records: Sequence[dict]) -> Sequence[dict]:
        """The records that the existing store lacks."""
        if self._base is None:
            return records
        found = self._base.rows([str(record["image_id"]) for record in records]) >= 0
        if self._base.manifest.get("image_list") == self._image_list:
            missing = [record for record, has in zip(records, found, strict=True) if not has]
            return missing if any(map(readable, missing)) else []  # they were unreadable
        if not found.any():
            raise UserError(
                f"{self.out} exists: regions of {len(self._base)} images, none of them among these "
                f"{len(records)} images; delete it or choose another output file"
            )
        if found.sum() < len(self._base):
            logger.info(
                "%s also has regions of %d other images, which are kept",
                self.out,
                len(self._base) - found.sum(),
            )
        return [record for record, has in zip(records, found, strict=True) if not has]

    def finished_summary(self) -> dict | None:
        """The summary of the store if it has the regions of all images.

        What an earlier run left of the folder of parts is removed.

        Raises:
            UserError: the store is damaged.
        """
        if self._base is None or self.records:
            return None
        self._base.verify()
        found = self._found_plan() or self._plan
        if all(found.get(key) == self._plan[key] for key in ("recipe", "image_list")):
            shutil.rmtree(self.folder, ignore_errors=True)
        return self._base.manifest["summary"]

    def write(self, part: int, results: Sequence[ImageResult]) -> int:
        """Write a part, which is itself a store.

        Returns:
            The number of unreadable images.
        """
        good = [r for r in results if not r.error]
        facts = {
            **self._facts(part),
            "unreadable": [(r.key, r.error) for r in results if r.error],
            "seconds": sum(r.seconds for r in good),
            "hits": sum((r.hits for r in good), Hits()),
            **{key: sum(getattr(r, key) for r in good) for key in _COUNTS},
        }
        write_store(self.path(part), ((r.key, r.width, r.height, r.boxes) for r in good), facts)
        return len(facts["unreadable"])

    def merge(self, tolerated: int) -> dict | None:
        """Merge the parts into the store and remove their folder, if all parts exist.

        Args:
            tolerated: largest number of unreadable images.

        Returns:
            The summary, or ``None`` if parts are missing.

        Raises:
            UserError: too many unreadable images.
        """
        with locked(self.out):
            base = self._existing()
            mine = base is not None and base.manifest.get("image_list") == self._image_list
            if mine and _content(base) != self._before:
                shutil.rmtree(self.folder, ignore_errors=True)
                return base.manifest["summary"]  # another shard was faster
            paths, manifests, counts = [], [], []
            for part in range(len(self)):  # one at a time: there may be more than file handles
                store = self._open(part)
                if store is not None:
                    paths.append(store.path)
                    manifests.append(store.manifest)
                    counts.append(store.counts())
            self._check_unreadable(manifests, tolerated)
            if len(paths) < len(self):
                logger.info(
                    "%d of %d parts are complete; the shard that completes the last one merges "
                    "them",
                    len(paths),
                    len(self),
                )
                return None
            if base is not None:
                logger.info("Extending %s by %d images", self.out, len(self.records))
                manifests.append(as_part(base.manifest["summary"]))
                counts.append(base.counts())
                paths.append(self.out)
            self._check_dropped(manifests)
            summary = summarise(manifests, np.concatenate(counts))
            facts = {
                "recipe": self.recipe.id,
                "parameters": self.recipe.parameters,
                "image_list": self._image_list,
                "reading": self._reading,
                "file_sizes": {
                    **(base.manifest.get("file_sizes", {}) if base else {}),
                    **self._sizes,
                },
                "summary": summary,
            }
            merge_stores(paths, self.out, facts)
            shutil.rmtree(self.folder, ignore_errors=True)
        return summary

    def _check_unreadable(self, manifests: Sequence[dict], tolerated: int) -> None:
        """List the unreadable images in a file, and refuse too many of them."""
        unreadable = [pair for manifest in manifests for pair in manifest["unreadable"]]
        listing = f"{self.out}.unreadable.txt"
        if unreadable:
            write_text_atomic(listing, "".join(map(_line, unreadable)))
            names = first_few([printable(key) for key, _ in unreadable], 3)
            logger.warning("unreadable images, listed in %s: %s", listing, names)
        elif os.path.exists(listing):
            os.remove(listing)  # written by an earlier run; the files have been fixed since
        if len(unreadable) > tolerated:
            raise UserError(
                f"{len(unreadable)} of {self._total} images cannot be read, more than the "
                f"{tolerated} that are tolerated (e.g. {unreadable[0][1]}): fix the files listed "
                f"in {listing} or raise --max-unreadable, and run again; finished parts are kept, "
                "if no file is removed before the search has finished"
            )

    def _check_dropped(self, manifests: Sequence[dict]) -> None:
        """Refuse boxes of which most are unusable or reach out of their images."""
        given, dropped, clipped = (sum(m[key] for m in manifests) for key in _COUNTS)
        if 2 * (dropped + clipped) > given:
            raise UserError(
                f"of {given} boxes, {dropped} are not finite or outside their image, and {clipped} "
                "reach out of it: are they pixels of these images, and corners or sides as their "
                f"format has them? Correct them, delete {self.folder}, and run again"
            )


def _content(store: RegionStore) -> tuple[str | None, int]:
    """What changes when a store is extended."""
    return store.manifest.get("image_list"), len(store)


def _line(pair: tuple[str, str]) -> str:
    key, error = map(printable, pair)
    return f"{key}\t{error}\n"
