#!/usr/bin/env python
"""Make the regions of a data set's images, before pre-training.

    tools/make_regions.py --images photos --out regions.arrow --recipe soco-v1
    tools/make_regions.py --dataset imagenet_train --out imagenet.arrow --shard 3/64
    tools/make_regions.py --config-file projects/NAME/configs/x.py   # what this config asks for
    tools/make_regions.py --dataset imagenet_train --out imagenet.arrow \\
        --shards 64 --slurm partition=cpu,cpus-per-task=16           # as a job array

Run it again after an interruption and it goes on. Shards may run at once on machines that share
the output's disk.
"""

import argparse
import logging
import re

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

from detectron2.config import instantiate

import region_pretrain.data  # noqa: F401  registers the built-in data sets
import region_pretrain.data.shapes  # noqa: F401
from region_pretrain.config import load_config
from region_pretrain.data.catalog import FOLDER_PREFIX, get_records
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_shards, wants_slurm
from region_pretrain.regions import RegionStore
from region_pretrain.regions.generate import format_summary, make_regions
from region_pretrain.regions.preview import draw_preview
from region_pretrain.regions.recipes import RECIPES, get_recipe


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    images = parser.add_mutually_exclusive_group(required=True)
    images.add_argument("--images", metavar="DIR", help="all images in a folder and below it")
    images.add_argument("--dataset", metavar="NAME", nargs="+", help="registered data sets")
    images.add_argument(
        "--config-file",
        metavar="FILE",
        help="a pre-training config, which says data set, recipe and store",
    )
    parser.add_argument("--out", metavar="FILE", help="the store, e.g. x.arrow")
    parser.add_argument(
        "--recipe", metavar="ID", help=f"{', '.join(RECIPES)} (default soco-v1, or the config's)"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="change a field of the recipe; it shows in the recipe's id",
    )
    parser.add_argument("--mode", help="selective search: fast, quality or single (--set mode=...)")
    parser.add_argument(
        "--working-size", metavar="PIXELS", help="shrink the long side to this before the search"
    )
    parser.add_argument("--workers", type=int, help="processes (default: one a core)")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="part of the work, from 0/N")
    parser.add_argument(
        "--max-unreadable",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the files that may be unreadable (default 0.01)",
    )
    parser.add_argument("--part-size", type=int, default=1000, help="images in a part (1000)")
    parser.add_argument("--preview", type=int, metavar="N", help="draw N images: FILE.preview.png")
    parser.add_argument(
        "--shards", type=int, default=1, metavar="N", help="with --slurm: so many jobs share it"
    )
    add_slurm_arguments(parser)
    parser.add_argument("opts", nargs="*", help="with --config-file: key=value")
    return parser.parse_args(argv)


def _arguments(args: argparse.Namespace, names: str | list[str], changes: dict) -> list[str]:
    """The command line of a shard, without a config that might be edited meanwhile."""
    if isinstance(names, str) and names.startswith(FOLDER_PREFIX):
        what = ["--images", names.removeprefix(FOLDER_PREFIX)]
    else:
        what = ["--dataset", *([names] if isinstance(names, str) else names)]
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
    return [*what, *map(str, given), *settings]


@exit_on_user_error
def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    names = args.dataset or FOLDER_PREFIX + (args.images or "")
    if args.config_file is not None:
        wanted = load_config(args.config_file, args.opts).dataloader.train.dataset
        if "regions" not in wanted:
            raise UserError(f"{args.config_file} asks for no regions: it is no pre-training config")
        if wanted.regions is None and not args.out:
            raise UserError(
                f"{args.config_file} needs no regions: start its pre-training, or say --out FILE "
                "and --recipe ID for regions of its images all the same"
            )
        names = instantiate(wanted.names)
        args.out = args.out or wanted.regions
        args.recipe = args.recipe or wanted.recipe
    elif args.opts:
        raise UserError(f"{args.opts[0]}: key=value goes with --config-file")
    if not args.out:
        raise UserError("say where the store goes: --out FILE")
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

    records = get_records(names)
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
    print(f"{args.out}: {recipe.id}\n{format_summary(summary)}")
    if args.preview:
        store = RegionStore.open(args.out)
        print(draw_preview(records, store, f"{args.out}.preview.png", args.preview))


if __name__ == "__main__":
    main()
