"""Make the regions of a data set for pre-training, and write them to a region store.

    %(prog)s --images photos --out regions.arrow --recipe soco-v1
    %(prog)s --dataset imagenet_train --out imagenet.arrow --shard 3/64
    %(prog)s --dataset imagenet_train --out imagenet.arrow \\
        --shards 64 --slurm partition=cpu,cpus-per-task=16           # as a job array

Boxes that another program computed, those of a detector, or of a pre-trained network's features:

    %(prog)s --images photos --out boxes.arrow --from boxes.csv --min-score 0.3 --top 50
    %(prog)s --images photos --out rpn.arrow --from-detector config.yaml model_final.pth
    %(prog)s --images photos --out own.arrow --from-features config.yaml model_final.pth

The regions that a config names:

    %(prog)s --config-file projects/SoCo/configs/soco_r18-fpn_b32_shapes.py

An interrupted run continues when it is started again. Shards may run at the same time on machines
that share the disk of the output.
"""

import argparse
import logging
import os
import re
from collections.abc import Iterable
from typing import Any

from detectron2.config import instantiate
from omegaconf import OmegaConf

import region_pretrain.data  # noqa: F401  registers the built-in data sets
import region_pretrain.data.emoji  # noqa: F401
import region_pretrain.data.shapes  # noqa: F401
from region_pretrain import registration
from region_pretrain.commands import text_parser
from region_pretrain.config import load_config
from region_pretrain.data.catalog import get_records
from region_pretrain.dataset_names import folder_name
from region_pretrain.engine.detector_regions import DetectorBoxes
from region_pretrain.engine.feature_regions import FeatureBoxes, load_trained
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_shards, wants_slurm
from region_pretrain.regions import RegionStore
from region_pretrain.regions.elsewhere import (
    FORMATS,
    DetectorRecipe,
    FeaturesRecipe,
    FileRecipe,
    attach,
    load_boxes,
    refuse_annotations,
)
from region_pretrain.regions.generate import Prepare, make_regions
from region_pretrain.regions.preview import draw_preview
from region_pretrain.regions.recipes import (
    ELSEWHERE,
    RECIPES,
    GroundTruthRecipe,
    Recipe,
    change,
    get_recipe,
)
from region_pretrain.regions.summary import format_summary

logger = logging.getLogger(__name__)


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", metavar="DIR", help="all images in a folder and its subfolders")
    images.add_argument(
        "--dataset",
        metavar="NAME",
        nargs="+",
        help="data sets: registered ones, coco://ANN.json?images=DIR, folder://DIR?bits=12, ...",
    )
    images.add_argument(
        "--config-file",
        metavar="FILE",
        help="a pre-training config, which names data set, recipe and store",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="a .py file or module that registers the data set",
    )
    parser.add_argument("--out", metavar="FILE", help="the store to write, e.g. x.arrow")
    parser.add_argument(
        "--recipe",
        metavar="ID",
        help=f"{', '.join(RECIPES)} (default: the config's or the existing store's, or soco-v1)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe, and thereby its id",
    )
    parser.add_argument(
        "--working-size", metavar="PIXELS", help="long side to downscale to before selective search"
    )
    _add_elsewhere(parser)
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument(
        "--shard", default="0/1", metavar="I/N", help="make only the I-th of N shards, 0 <= I < N"
    )
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="FRACTION",
        help="largest fraction of unreadable files (default %(default)s)",
    )
    parser.add_argument(
        "--part-size",
        type=int,
        metavar="N",
        help="images per part, the unit of resumption (default 1000; with several shards fewer if "
        "each would have less than four parts)",
    )
    parser.add_argument(
        "--preview", type=int, metavar="N", help="draw N images to FILE.preview.png"
    )
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="with --slurm: number of jobs"
    )
    add_slurm_arguments(parser)
    parser.add_argument("opts", nargs="*", metavar="key=value", help="config overrides")
    return parser


def _add_elsewhere(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of boxes that another program computed."""
    group = parser.add_argument_group("boxes from elsewhere", "replace --recipe")
    group.add_argument(
        "--from",
        dest="boxes",
        metavar="PATH",
        help="a file of boxes: COCO's results or annotations, masks in JSON, Detectron2's "
        "proposals, CSV; or a folder with a JSON file of masks or a PNG label map per image",
    )
    group.add_argument(
        "--format", metavar="NAME", help=f"{', '.join(FORMATS)} (default: recognised)"
    )
    group.add_argument(
        "--ids", metavar="ANN.json", help="COCO json that lists the images whose ids --from uses"
    )
    group.add_argument(
        "--from-detector",
        nargs=2,
        metavar=("CONFIG", "WEIGHTS"),
        help="a trained detector: a LazyConfig, the config.yaml of a run or Detectron2's yaml, "
        "and its checkpoint",
    )
    group.add_argument(
        "--detections",
        action="store_true",
        help="the detector's final boxes instead of the proposals of its first stage",
    )
    group.add_argument(
        "--from-features",
        nargs=2,
        metavar=("CONFIG", "CHECKPOINT"),
        help="clusters of the features of a pre-training run or a detector",
    )
    group.add_argument("--batch-size", type=int, help="the network's images per batch (default 8)")
    group.add_argument("--device", help="cuda, mps or cpu (default: a GPU if there is one)")
    group.add_argument("--min-score", metavar="S", help="leave out boxes with a lower score")
    group.add_argument(
        "--nms-iou", metavar="IOU", help="leave out boxes that overlap more with a better one"
    )
    group.add_argument("--top", metavar="N", help="keep the N best boxes of each image")
    group.add_argument(
        "--with-zero", action="store_true", help="label 0 of label maps is not background"
    )


#: Arguments of :func:`_add_elsewhere` that are fields of the recipes; those of all boxes first.
_FIELDS = ("min_score", "nms_iou", "top", "with_zero", "detections")


#: Arguments that name a config and its weights.
_NETWORKS = ("from_detector", "from_features")


#: Arguments of jobs, besides those that have another name than their value.
_PASSED = ("format", "ids", "batch_size", "device", *_FIELDS[:3])


def _given(args: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those arguments that differ from their default, None or False."""
    values = {name: getattr(args, name) for name in names}
    return {name: v for name, v in values.items() if v is not None and v is not False}


def _wants_elsewhere(args: argparse.Namespace) -> bool:
    """Whether the boxes come from elsewhere; refuses arguments that contradict this."""
    file, detector, features = (
        value is not None for value in (args.boxes, args.from_detector, args.from_features)
    )
    if file + detector + features > 1:
        raise UserError("--from, --from-detector and --from-features exclude each other")
    elsewhere = file or detector or features
    if elsewhere and (wrong := _given(args, "recipe", "working_size")):
        raise UserError(f"--{_flag(wrong)} does not apply to boxes from elsewhere")
    for source, applies, names in (
        ("--from", file, ("format", "ids", "with_zero")),
        ("--from-detector", detector, ("detections",)),
        ("--from-detector or --from-features", detector or features, ("device", "batch_size")),
        ("--from, --from-detector or --from-features", elsewhere, _FIELDS[:3]),
    ):
        if not applies and (wrong := _given(args, *names)):
            raise UserError(f"--{_flag(wrong)} needs {source}")
    return elsewhere


def _flag(names: Iterable[str]) -> str:
    return next(iter(names)).replace("_", "-")


def _elsewhere(
    args: argparse.Namespace, records: list[dict], changes: dict[str, Any]
) -> tuple[list[dict], Recipe, Prepare | None]:
    """The records with their boxes, the recipe, and what computes boxes that are not there yet."""
    changes = {**changes, **_given(args, *_FIELDS)}
    if args.boxes is not None:
        boxes = load_boxes(args.boxes, args.format, args.ids)
        recipe = change(FileRecipe("file-v1", source=boxes.digest), changes)
        return attach(records, boxes), recipe, None
    if args.from_features is not None:
        recipe = change(FeaturesRecipe("features-v1"), changes)
        model = load_trained(*args.from_features, device=args.device)
        features = FeatureBoxes(model, recipe, **_given(args, "batch_size"))
        return records, features.recipe, features
    options = _given(args, "detections", "batch_size", "device")
    detector = DetectorBoxes(*args.from_detector, **options)
    changes["detections"] = detector.detections
    return records, change(DetectorRecipe("detector-v1", source=detector.digest), changes), detector


def _recipe_of(path: str) -> str | None:
    """The recipe of an existing store, which it keeps if no other is given; None: the default."""
    found = RegionStore.open(path).manifest["recipe"]
    if found.split("+")[0] in ELSEWHERE:
        return None
    logger.info("%s has recipe %s", path, found)
    return found


def _arguments(args: argparse.Namespace, names: str | list[str], changes: dict) -> list[str]:
    """The arguments of a shard's job, independent of the config, which might be edited."""
    names = [names] if isinstance(names, str) else names
    code = [text for entry in args.register for text in ("--register", entry)]
    flags = {
        "--out": args.out,
        "--recipe": None if _given(args, "boxes", *_NETWORKS) else args.recipe,
        "--workers": args.workers,
        "--max-unreadable": args.max_unreadable,
        "--part-size": args.part_size,
        "--preview": args.preview,
        "--from": args.boxes,
        **{f"--{name.replace('_', '-')}": getattr(args, name) for name in _PASSED},
    }
    given = [text for flag, value in flags.items() if value is not None for text in (flag, value)]
    settings = [text for item in changes.items() for text in ("--set", "=".join(item))]
    settings += [f"--{name.replace('_', '-')}" for name in _given(args, "with_zero", "detections")]
    for name, files in _given(args, *_NETWORKS).items():
        settings += [f"--{name.replace('_', '-')}", *files]
    return ["--dataset", *names, *code, *map(str, given), *settings]


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Make or submit the regions."""
    args = make_parser(prog).parse_intermixed_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    registration.execute(args.register)
    elsewhere = _wants_elsewhere(args)
    names = args.dataset or folder_name(args.images or "")
    if args.config_file is not None:
        cfg = load_config(args.config_file, args.opts)
        args.register += cfg.train.register
        dataset = OmegaConf.select(cfg, "dataloader.train.dataset") or {}
        if "regions" not in dataset:
            raise UserError(f"{args.config_file} is not a pre-training config: it has no regions")
        if dataset.regions is None and not args.out:
            raise UserError(
                f"{args.config_file} needs no regions: start its pre-training, or give --out FILE "
                "and --recipe ID to make regions of its images anyway"
            )
        names = instantiate(dataset.names)
        args.out = args.out or dataset.regions
        args.recipe = args.recipe or dataset.recipe
    elif args.opts:
        raise UserError(f"{args.opts[0]}: config overrides need --config-file")
    if not args.out:
        raise UserError("no output file: give --out FILE")
    changes = {}
    for text in args.set:
        field, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"--set {text}: write FIELD=VALUE")
        changes[field] = value
    if args.working_size is not None:
        changes["working_size"] = args.working_size
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if shard is None:
        raise UserError(f"--shard {args.shard}: write I/N, e.g. 0/8")
    if args.preview is not None and args.preview < 1:
        raise UserError(f"--preview {args.preview}: draw at least one image")

    if not elsewhere and args.recipe is None and not changes and os.path.isfile(args.out):
        args.recipe = _recipe_of(args.out)
    recipe = None if elsewhere else get_recipe(args.recipe or "soco-v1", changes)
    labels = isinstance(recipe, GroundTruthRecipe)
    if args.boxes is not None:
        refuse_annotations(args.boxes, names)
    if args.slurm is None and args.shards != 1:
        raise UserError(
            f"--shards {args.shards} is the number of jobs with --slurm; without it, run "
            f"--shard I/{args.shards} for every I from 0 to {args.shards - 1}"
        )
    if args.slurm is not None and args.shard != "0/1":
        raise UserError(
            f"--shard {args.shard} with --slurm: --shards {shard[2]} submits all of them"
        )
    records, prepare = get_records(names, annotations=labels, boxes=True), None
    if wants_slurm(args):
        submit_shards(args, _arguments(args, names, changes), args.out)
        return
    if elsewhere:
        records, recipe, prepare = _elsewhere(args, records, changes)
        if (args.recipe or "").split("+")[0] in ELSEWHERE and args.recipe != recipe.id:
            raise UserError(
                f"the config requires recipe {args.recipe}, but these boxes are {recipe.id}"
            )
    summary = make_regions(
        records,
        args.out,
        recipe,
        workers=args.workers,
        shard=(int(shard[1]), int(shard[2])),
        max_unreadable=args.max_unreadable,
        part_size=args.part_size,
        prepare=prepare,
    )
    if summary is None:
        return
    print(f"{args.out}: recipe {recipe.id}\n{format_summary(summary)}")
    if args.recipe not in (None, recipe.id) and elsewhere:
        print(f"to train on them: 'dataloader.train.dataset.recipe=\"{recipe.id}\"'")
    if args.preview:
        store = RegionStore.open(args.out)
        print(draw_preview(records, store, f"{args.out}.preview.png", args.preview))
