"""Make the regions of a data set for pre-training, and write them to a region store.

    %(prog)s --images photos --out regions.arrow --recipe soco-v1
    %(prog)s --dataset imagenet_train --out imagenet.arrow --shard 3/64
    %(prog)s --dataset imagenet_train --out imagenet.arrow \\
        --shards 64 --slurm partition=cpu,cpus-per-task=16           # as a job array

The regions that a config names:

    %(prog)s --config-file projects/SoCo/configs/soco_r18-fpn_b32_shapes.py

An interrupted run continues when it is started again. Shards may run at the same time on machines
that share the disk of the output.
"""

import argparse
import logging
import re

from detectron2.config import instantiate

import region_pretrain.data  # noqa: F401  registers the built-in data sets
import region_pretrain.data.emoji  # noqa: F401
import region_pretrain.data.shapes  # noqa: F401
from region_pretrain import registration
from region_pretrain.commands import text_parser
from region_pretrain.config import load_config
from region_pretrain.data.catalog import get_records
from region_pretrain.dataset_names import folder_name
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_shards, wants_slurm
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import make_regions
from region_pretrain.regions.preview import draw_preview
from region_pretrain.regions.recipes import RECIPES, GroundTruthRecipe, get_recipe
from region_pretrain.regions.summary import format_summary


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
        "--recipe", metavar="ID", help=f"{', '.join(RECIPES)} (default: the config's, or soco-v1)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe, and thereby its id",
    )
    parser.add_argument("--mode", help="mode of selective search: fast, quality or single")
    parser.add_argument(
        "--working-size", metavar="PIXELS", help="long side to downscale to before selective search"
    )
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
        default=1000,
        metavar="N",
        help="images per part, the unit of resumption (default %(default)s)",
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


def _arguments(args: argparse.Namespace, names: str | list[str], changes: dict) -> list[str]:
    """The arguments of a shard's job, independent of the config, which might be edited."""
    names = [names] if isinstance(names, str) else names
    code = [text for entry in args.register for text in ("--register", entry)]
    flags = {
        "--out": args.out,
        "--recipe": args.recipe,
        "--workers": args.workers,
        "--max-unreadable": args.max_unreadable,
        "--part-size": args.part_size,
        "--preview": args.preview,
    }
    given = [text for flag, value in flags.items() if value is not None for text in (flag, value)]
    settings = [text for item in changes.items() for text in ("--set", "=".join(item))]
    return ["--dataset", *names, *code, *map(str, given), *settings]


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Make or submit the regions."""
    args = make_parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    registration.execute(args.register)
    names = args.dataset or folder_name(args.images or "")
    if args.config_file is not None:
        cfg = load_config(args.config_file, args.opts)
        args.register += cfg.train.register
        dataset = cfg.dataloader.train.dataset
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
    for change in args.set:
        field, equals, value = change.partition("=")
        if not equals:
            raise UserError(f"--set {change}: write FIELD=VALUE")
        changes[field] = value
    if args.mode is not None:
        changes["mode"] = args.mode
    if args.working_size is not None:
        changes["working_size"] = args.working_size
    recipe = get_recipe(args.recipe or "soco-v1", changes)
    shard = re.fullmatch(r"(\d+)/(\d+)", args.shard)
    if shard is None:
        raise UserError(f"--shard {args.shard}: write I/N, e.g. 0/8")
    if args.preview is not None and args.preview < 1:
        raise UserError(f"--preview {args.preview}: draw at least one image")

    records = get_records(names, annotations=isinstance(recipe, GroundTruthRecipe))
    if wants_slurm(args):
        submit_shards(args, "tools/make_regions.py", _arguments(args, names, changes), args.out)
        return
    summary = make_regions(
        records,
        args.out,
        recipe,
        workers=args.workers,
        shard=(int(shard[1]), int(shard[2])),
        max_unreadable=args.max_unreadable,
        part_size=args.part_size,
    )
    if summary is None:
        return
    print(f"{args.out}: recipe {recipe.id}\n{format_summary(summary)}")
    if args.preview:
        store = RegionStore.open(args.out)
        print(draw_preview(records, store, f"{args.out}.preview.png", args.preview))
