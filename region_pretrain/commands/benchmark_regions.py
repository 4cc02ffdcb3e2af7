"""Compare recipes of regions by time per image, and by recall and precision of objects.

    %(prog)s          # on Shapes of 500 pixels
    %(prog)s --dataset coco_2017_val --count 100 \\
        soco-v1 soco-v1+working_size=320

Everything runs on one core.
"""

import argparse

from region_pretrain.benchmark.regions import compare_recipes
from region_pretrain.commands import text_parser
from region_pretrain.data.catalog import get_records
from region_pretrain.data.shapes import shapes
from region_pretrain.errors import exit_on_user_error
from region_pretrain.regions.recipes import get_recipe
from region_pretrain.regions.summary import PRECISION_IOU, RECALL_IOUS
from region_pretrain.reporting.summary import text_table

_SEARCH = "ccop-v1+max_aspect=100+max_boxes=100000+min_size=0+nms_iou=1"  # without any filter
#: Selective search alone at full size, 250 and 160 pixels, and recipes with their filters.
RECIPES = {
    **{
        f"search alone, {mode}, {size or 'full size'}": f"{_SEARCH}+mode={mode}+working_size={size}"
        for mode in ("fast", "single")
        for size in (0, 250, 160)
    },
    "search alone, quality, 250": f"{_SEARCH}+mode=quality+working_size=250",
    **{
        recipe: recipe
        for name in ("soco-v1", "ccop-v1")
        for recipe in (name, f"{name}+working_size=250")
    },
}


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "recipes",
        nargs="*",
        metavar="RECIPE",
        help="ids of recipes; speeds are relative to the first",
    )
    parser.add_argument("--dataset", metavar="NAME", help="a data set with boxes (default: Shapes)")
    parser.add_argument("--level", default="medium", help="level of Shapes (default %(default)s)")
    parser.add_argument(
        "--side", type=int, default=500, help="side of Shapes in pixels (default %(default)s)"
    )
    parser.add_argument(
        "--count", type=int, default=50, help="number of images (default %(default)s)"
    )
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Compare the recipes, and print a table."""
    args = make_parser(prog).parse_args(argv)
    chosen = {name: name for name in args.recipes} or RECIPES
    recipes = [get_recipe(recipe) for recipe in chosen.values()]
    dataset = args.dataset or shapes(
        split="val", size=args.count, side=args.side, level=args.level, seed=0
    )
    costs = compare_recipes(get_records(dataset)[: args.count], recipes)
    rows = [
        [
            name,
            f"{cost.seconds:.3f}",
            f"{costs[0].seconds / cost.seconds:.1f}x",
            f"{cost.boxes:.0f}",
            *(f"{value:.1f}" for value in (*cost.recall.values(), cost.precision)),
        ]
        for name, cost in zip(chosen, costs, strict=True)
    ]
    header = ["recipe", "s/image", "speed-up", "boxes/image"]
    header += [f"recall@{iou:g} (%)" for iou in RECALL_IOUS]
    header += [f"precision@{PRECISION_IOU:g} (%)"]
    print(text_table(rows, header))
