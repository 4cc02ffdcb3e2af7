"""What is in a data set and what is wrong with it, before anything is trained on it."""

from __future__ import annotations

import copy
import logging
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from omegaconf import DictConfig
from tabulate import tabulate
from tqdm import tqdm

from region_pretrain.data.catalog import check_registered, get_records, warn_of_few_bits
from region_pretrain.data.coco_fixes import read_head
from region_pretrain.data.coco_json import json_of_records, load_coco, mend_registered
from region_pretrain.data.common_images import same_images
from region_pretrain.data.evaluators import is_evaluated_by
from region_pretrain.data.findings import Finding, Findings, box_findings
from region_pretrain.data.masks import MaskCount, check_evaluated_masks, check_masks
from region_pretrain.data.other_labels import check_evaluated_keypoints
from region_pretrain.data.sources import check_voc_files, findings_of, read_like
from region_pretrain.dataset_names import is_path_name, parse
from region_pretrain.errors import UserError
from region_pretrain.images import FileSystemFailure, UnreadableImage, read_record
from region_pretrain.system import cores

logger = logging.getLogger(__name__)

#: Largest fraction of unreadable files that is not an error.
MAX_UNREADABLE = 0.01
_CLASSES_IN_A_LINE = 20


def prepare_labels(cfg: DictConfig, names: Mapping[str, Sequence[str]]) -> list[str]:
    """Fix the labels of a detection config's data sets, and check what their evaluation needs.

    Args:
        cfg: complete; its data sets are registered.
        names: split (``train``, ``test``) -> data sets.

    Returns:
        Lines for the log: images and boxes of each COCO data set, and what was fixed.

    Raises:
        UserError: a data set cannot be trained on or evaluated.
    """
    lines: dict[str, None] = {}
    for split, name in [(split, name) for split, some in names.items() for name in some]:
        evaluated = split == "test" and is_evaluated_by(cfg, COCOEvaluator, name)
        if split == "test" and is_evaluated_by(cfg, PascalVOCDetectionEvaluator, name):
            check_voc_files(name, training="train" in names)
        if is_path_name(name):
            findings, records = findings_of(name), DatasetCatalog.get(name)
            if parse(name).scheme == "voc":
                if evaluated:
                    MetadataCatalog.get(name).json_file = json_of_records(name)
                for finding in box_findings(records):
                    logger.warning("%s: %s; correct the labels", name, finding)
        else:
            data = mend_registered(name, evaluated)
            if data is None:
                if evaluated and "train" in names:
                    _refuse_no_boxes(name, DatasetCatalog.get(name))
                continue
            findings, records = data.findings, data.records
        warn_of_few_bits(name, records)
        if split == "train":
            _refuse_untrainable(name, records)
        if evaluated:
            _check_evaluated(cfg, name, records, "train" in names)
        classes = list(MetadataCatalog.get(name).get("thing_classes", ()))
        lines.update(dict.fromkeys(summary(name, records, classes, findings)))
    return list(lines)


def check_labels(cfg: DictConfig, names: Mapping[str, Sequence[str]]) -> None:
    """Check the data sets named by path, whose labels are read anyway, without fixing anything.

    Args:
        cfg, names: as for :func:`prepare_labels`; unchanged.

    Raises:
        UserError: no subset of a data set can be trained on, or it cannot be evaluated.
    """
    for split, name in [(split, name) for split, some in names.items() for name in some]:
        if not is_path_name(name):
            continue
        records = DatasetCatalog.get(name)
        if split == "train":
            _refuse_untrainable(name, records)
            if not MaskCount.of(records).masks:
                check_masks(records, copy.deepcopy(cfg))
        elif is_evaluated_by(cfg, COCOEvaluator, name):
            _check_evaluated(cfg, name, records, "train" in names)


def _refuse_untrainable(name: str, records: Sequence[Mapping]) -> None:
    if not _has_boxes(records):
        raise UserError(f"data set {name!r} has no boxes: it cannot be trained on")


def _check_evaluated(cfg: DictConfig, name: str, records: Sequence[Mapping], trained: bool) -> None:
    if trained:
        _refuse_no_boxes(name, records)
    check_evaluated_masks(name, records, cfg)
    check_evaluated_keypoints(name, records, cfg)


def _has_boxes(records: Sequence[Mapping]) -> bool:
    boxes = (a for record in records for a in record.get("annotations") or ())
    return not all(a.get("iscrowd") for a in boxes)


def _refuse_no_boxes(name: str, records: Sequence[Mapping]) -> None:
    """An evaluation after a training that would have no AP."""
    if not any("annotations" in record for record in records):  # such as COCO's test images
        logger.warning(
            "data set %r has no annotations: detections are written, but there is no AP", name
        )
    elif not _has_boxes(records):
        raise UserError(
            f"data set {name!r} has no boxes, so its AP is undefined: name labelled images in "
            "dataloader.test.dataset.names (val= in Python)"
        )


def summary(
    name: str, records: Sequence[Mapping], classes: Sequence[str], findings: Sequence[Finding]
) -> list[str]:
    """A data set in a few lines: images, boxes per class, findings."""
    boxes = boxes_per_class(records, classes)
    counts = [f"{c} {n}" for c, n in list(boxes.items())[:_CLASSES_IN_A_LINE]]
    if len(boxes) > len(counts):
        counts.append(f"and {len(boxes) - len(counts)} more classes")
    crowds = sum(bool(a.get("iscrowd")) for r in records for a in r.get("annotations", ()))
    of_them = f", {crowds} of them crowd regions" if crowds else ""
    total = f"{len(records)} images, {sum(boxes.values())} boxes ({', '.join(counts)}){of_them}"
    return [f"{name}: {total}", *(f"{name}: {finding}" for finding in findings)]


def boxes_per_class(records: Sequence[Mapping], classes: Sequence[str]) -> dict[str, int]:
    """Number of boxes of each class, crowd regions included."""
    counts = Counter(a["category_id"] for r in records for a in r.get("annotations", ()))
    return {name: counts[index] for index, name in enumerate(classes)}


@dataclass
class Inspection:
    """A data set, inspected.

    Attributes:
        name: its name.
        records: its Detectron2 records.
        classes: class names; empty without labels.
        findings: what is unusual, or was fixed.
        problems: what has to be corrected before it can be used.
        sizes: ``(width, height)`` of each inspected image that is readable.
        formats: number of files per format.
    """

    name: str
    records: list[dict[str, Any]] = field(default_factory=list)
    classes: list[str] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    formats: Counter = field(default_factory=Counter)

    def lines(self) -> Iterator[str]:
        """The report."""
        yield self.name
        formats = ", ".join(f"{n} {kind}" for kind, n in self.formats.most_common())
        yield f"  images: {len(self.records)}" + (f"; inspected: {formats}" if formats else "")
        if self.sizes:
            columns = list(zip(*self.sizes, strict=True))
            smallest, median, largest = (
                "x".join(f"{of(column):.0f}" for column in columns)
                for of in (min, statistics.median, max)
            )
            yield f"  width x height: smallest {smallest}, median {median}, largest {largest}"
        labelled = [r["annotations"] for r in self.records if "annotations" in r]
        if labelled:
            boxes = sum(map(len, labelled))
            masks = sum(bool(a.get("segmentation")) for found in labelled for a in found)
            empty = labelled.count([])
            yield f"  boxes: {boxes}, {masks} with a mask; images without boxes: {empty}"
            if boxes and masks < boxes:
                yield "  note: a mask head needs a mask for each box; use a faster_rcnn_* config"
        if self.classes and labelled:
            boxes = boxes_per_class(self.records, self.classes)
            images = Counter(c for found in labelled for c in {a["category_id"] for a in found})
            rows = [(c, boxes[c], images[index]) for index, c in enumerate(self.classes)]
            table = tabulate(rows, ("class", "boxes", "images"), disable_numparse=[0])
            yield from (f"    {line}" for line in table.splitlines())
        for finding in self.findings:
            yield f"  {'fixed' if finding.fixed else 'note'}: {finding}"
        for problem in self.problems:
            yield f"  error: {problem}"


def inspect(
    name: str, decode: bool = False, max_images: int | None = None, workers: int | None = None
) -> Inspection:
    """Inspect a data set: its labels, and the files of its images.

    Args:
        name: a registered data set, or one named by path.
        decode: decode the images; by default only their headers are read.
        max_images: inspect this many files, spread evenly; the labels are inspected completely.
        workers: threads; default: one per core.

    Returns:
        The report. A data set that cannot be loaded has a problem and no records.
    """
    found = Inspection(name)
    try:
        source = _coco_source(name)
        if source is None:
            found.records = get_records(name)
            found.classes = list(MetadataCatalog.get(name).get("thing_classes", ()))
            if any("bbox" in a for r in found.records for a in r.get("annotations", ())):
                found.findings = box_findings(found.records)
        else:
            data = load_coco(*source)
            found.records = _like(name, data.records)
        swapped = _inspect_files(found, decode, max_images, workers, coco=source is not None)
        if source is not None:
            if swapped:
                data = load_coco(*source, all_sizes=True)
            if data.fixed:
                data.json_file  # noqa: B018  written once, for the runs that follow
            found.records, found.classes = _like(name, data.records), data.classes
            found.findings = data.findings + found.findings
            labelled = any(r.get("annotations") for r in found.records)
            labelled |= any("left out" in finding.what for finding in data.findings)
            if labelled and not _has_boxes(found.records):
                found.problems.append(
                    f"{source[0]} has no usable box: its annotations are left out, or crowds; "
                    "correct them"
                )
    except UserError as error:
        found.problems.append(str(error))
    return found


def _like(name: str, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return read_like(parse(name), records) if is_path_name(name) else records


def _coco_source(name: str) -> tuple[str, str] | None:
    """Json and image folder of ``coco://`` and of stock Detectron2's COCO data sets."""
    if is_path_name(name):
        source = parse(name)
        return (source.path, source.images) if source.scheme == "coco" else None
    if name.endswith(".json") and name not in DatasetCatalog:
        raise UserError(f"no data set is called {name!r}; write coco://{name}?images=DIR")
    check_registered(name)
    if DatasetCatalog[name].__module__ != "detectron2.data.datasets.coco":
        return None
    metadata = MetadataCatalog.get(name)
    return metadata.json_file, metadata.image_root


class _File(NamedTuple):
    """What a file is: an error, or size, format, bits per band and bands without alpha."""

    error: str = ""
    size: tuple[int, int] = (0, 0)
    format: str = ""
    bits: int = 8
    bands: int = 3


def _read_file(record: Mapping, decode: bool) -> _File:
    given = record.get("width"), record.get("height")
    try:
        image = read_head(record["file_name"], None if None in given else given)
        header = image.header
        bands = header.bands - header.alpha
        if decode and (bands in (1, 3) or "bands" in record.get("reading", {})):
            read_record(record, "RGB")
    except (UnreadableImage, FileSystemFailure, OSError) as error:
        return _File(error=" ".join(str(error).split()))
    return _File("", image.size(), header.format, header.bits, bands)


def _inspect_files(
    found: Inspection, decode: bool, max_images: int | None, workers: int | None, coco: bool
) -> bool:
    """Inspect the files of a data set; returns whether a size is that before the EXIF turn."""
    records = found.records
    if max_images is not None and max_images < len(records):
        records = [records[i * len(records) // max_images] for i in range(max_images)]
    notes, wrong = Findings(), Findings()
    unreadable: list[str] = []
    swapped = False
    with ThreadPoolExecutor(workers or len(cores())) as pool:
        files = pool.map(lambda record: _read_file(record, decode), records)
        for record, file in tqdm(
            zip(records, files, strict=True), found.name, len(records), unit="img"
        ):
            path = record["file_name"]
            if file.error:
                unreadable.append(file.error)
                continue
            found.formats[file.format] += 1
            if file.bands not in (1, 3) and "bands" not in record.get("reading", {}):
                hint = f"image of {file.bands} bands; choose three: add bands="
                wrong.add(f"{hint} to the options of the data set's name", path)
                continue
            found.sizes.append(file.size)
            given = record.get("width", file.size[0]), record.get("height", file.size[1])
            if "crop" not in record and given != file.size:
                turned = given == file.size[::-1]
                swapped |= turned
                if not (turned and coco):
                    both = f"{path}: {given[0]}x{given[1]}, file {file.size[0]}x{file.size[1]}"
                    wrong.add("size that contradicts the file", both)
            if file.bits > 8 and "bits" not in record.get("reading", {}):
                hint = "of more than 8 bits; for less than 16 significant bits, add bits="
                notes.add(f"image {hint} to the options of the data set's name", path, fixed=False)
    if unreadable:
        text = f"{len(unreadable)} unreadable files, e.g. {unreadable[0]}"
        if len(unreadable) > MAX_UNREADABLE * len(records):
            found.problems.append(f"{text}: repair or remove them")
        else:
            notes.add("unreadable file", unreadable[0], fixed=False)
    found.findings += notes.list()
    found.problems += map(str, wrong.list())
    return swapped


def compare(a: Inspection, b: Inspection) -> tuple[list[str], list[str]]:
    """Compare two data sets, such as those for training and validation.

    Returns:
        Notes, and problems: images in both, and different classes.
    """
    notes, problems = [], []
    if a.classes and b.classes and a.classes != b.classes:
        only = [
            f"only {x.name} has {', '.join(missing)}"
            for x, y in ((a, b), (b, a))
            if (missing := [c for c in x.classes if c not in y.classes])
        ]
        both = f"{a.name} and {b.name}"
        problems.append(f"{both} differ in their classes: {'; '.join(only) or 'another order'}")
    if note := same_images(a.name, b.name, a.records, b.records):
        notes.append(note)
    return notes, problems
