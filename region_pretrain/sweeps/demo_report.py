"""The demo's report: pictures, curves and tables on one page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.config import instantiate
from detectron2.data import MetadataCatalog, detection_utils
from detectron2.structures import BoxMode

from region_pretrain.data.catalog import get_records
from region_pretrain.engine.build import build_model
from region_pretrain.engine.transfer import load_pretrained
from region_pretrain.evaluation.knn_probe import evaluating
from region_pretrain.reporting import html as report
from region_pretrain.reporting.pictures import first_views, view_pictures
from region_pretrain.reporting.plots import draw_detections, plot_ap, plot_loss
from region_pretrain.sweeps.demo_tables import tables

if TYPE_CHECKING:
    from region_pretrain.sweeps.demo import Job

_NAMES = {"scratch": "from scratch", "pretrained": "pre-trained"}
_IMAGES = 4


def write_demo_report(path: str, job: Job, results: Mapping[str, Any]) -> None:
    """Write the page. Its pictures are of the first seed.

    Args:
        path: of the ``.html`` file.
        job: what ran; its outputs are read.
        results: of :func:`region_pretrain.sweeps.demo.run_demo`.
    """
    seed = results["seeds"][0]
    machine, versions = results["machine"], results["versions"]
    facts = ", ".join(f"{name} {version}" for name, version in versions.items())
    cfg = job.load(job.pretrain_config, job.pretrain_overrides(seed))
    views = view_pictures(first_views(cfg, _IMAGES))
    sections = [
        report.Section(
            "Results",
            [
                report.text(f"{machine['cpu']}, {machine['cores']} cores; {facts}."),
                *(b for t in tables(results) for b in (report.text(t[0]), report.table(*t[1:]))),
            ],
        ),
        report.Section(
            "What pre-training sees",
            [
                report.text(
                    "The views of some images, after photometry. Boxes of one colour are the same "
                    "region; their embeddings are made to agree."
                ),
                report.picture_grid([f"view {v + 1}" for v in range(len(views[0]))], views),
            ],
        ),
        report.Section(
            "Pre-training loss",
            [
                report.figure(
                    plot_loss({f"seed {s}": job.folder(s, "pretrain") for s in results["seeds"]}),
                    "Pre-training loss by iteration.",
                )
            ],
        ),
        report.Section(
            "Fine-tuning",
            [
                report.figure(
                    plot_ap({label: job.folder(seed, s) for s, label in _NAMES.items()}, key),
                    f"{kind} AP on the validation images by iteration, seed {seed}.",
                )
                for key, kind in (("bbox/AP", "Box"), ("segm/AP", "Mask"))
            ],
        ),
        report.Section(
            "Detections",
            [
                report.text("Validation images; detections with a score of at least 50 %."),
                report.picture_grid(
                    ["ground truth", *_NAMES.values()], _detections(job, seed, _IMAGES)
                ),
            ],
        ),
        report.Section(
            "Commands", [report.text(command) for command in results["commands"].values()]
        ),
    ]
    write = "A demo of the quick size: its numbers mean nothing" if results["quick"] else "Demo"
    report.write_report(path, sections, write)


def _detections(job: Job, seed: int, count: int) -> list[list[np.ndarray]]:
    """Ground truth and the detections of both starts on the first validation images."""
    cfg = job.load(job.detection_config, job.detection_overrides(seed, "scratch", 0.0, ""))
    name = instantiate(cfg.dataloader.test.dataset.names)
    records = get_records(name)[:count]
    images = [detection_utils.read_image(r["file_name"], format="RGB") for r in records]
    classes = MetadataCatalog.get(name).thing_classes
    rows = []
    for record, image in zip(records, images, strict=True):
        truth = record["annotations"]
        boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in truth]
        labels = [a["category_id"] for a in truth]
        rows.append([draw_detections(image, np.array(boxes), labels, classes)])
    detector = build_model(cfg, torch.device("cpu"))
    for start in _NAMES:
        load_pretrained(detector, job.weights(seed, start))
        with evaluating(detector):
            inputs = [
                {"image": _pixels(image, detector.input_format), "height": h, "width": w}
                for image in images
                for h, w in [image.shape[:2]]
            ]
            outputs = [output["instances"] for output in detector(inputs)]
        for row, image, found in zip(rows, images, outputs, strict=True):
            row.append(
                draw_detections(
                    image,
                    found.pred_boxes.tensor.numpy(),
                    found.pred_classes.tolist(),
                    classes,
                    found.scores.tolist(),
                )
            )
    return rows


def _pixels(image: np.ndarray, input_format: str) -> torch.Tensor:
    """RGB (H, W, 3) as the detector's mapper gives it: (3, H, W) in its own order."""
    ordered = image[:, :, ::-1] if input_format == "BGR" else image
    return torch.from_numpy(np.ascontiguousarray(ordered.transpose(2, 0, 1)))
