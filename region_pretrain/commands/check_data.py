"""Check data sets before training: image files, boxes per class, and what is wrong with them.

    %(prog)s coco://train.json?images=DIR coco://val.json?images=DIR
    %(prog)s folder://DIR --decode

Exits with 0 if the data sets can be used, with 1 if something has to be corrected first.
"""

import argparse
import itertools
import logging

import region_pretrain.data.emoji  # noqa: F401
import region_pretrain.data.shapes  # noqa: F401  registers data sets
from region_pretrain import registration
from region_pretrain.commands import text_parser
from region_pretrain.data.inspection import compare, inspect
from region_pretrain.errors import UserError, exit_on_user_error


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "names",
        nargs="+",
        metavar="NAME",
        help="registered data sets, coco://ANN.json?images=DIR, voc://ROOT?split=NAME, folder://DIR",
    )
    parser.add_argument(
        "--register",
        action="append",
        default=[],
        metavar="FILE",
        help="a .py file or module that registers data sets",
    )
    parser.add_argument(
        "--decode", action="store_true", help="decode every image; default: read the headers"
    )
    parser.add_argument(
        "--max-images", type=int, metavar="N", help="read at most N files per data set"
    )
    parser.add_argument("--workers", type=int, help="threads (default: one per core)")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> int:
    """Check the data sets; returns 1 if there are problems."""
    args = make_parser(prog).parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    for flag, value in (("--max-images", args.max_images), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    registration.execute(args.register)
    found = []
    for name in args.names:
        found.append(inspect(name, args.decode, args.max_images, args.workers))
        print("\n".join(found[-1].lines()), flush=True)
    failed = any(inspection.problems for inspection in found)
    for a, b in itertools.combinations(found, 2):
        notes, problems = compare(a, b)
        failed |= bool(problems)
        print("\n".join([f"note: {n}" for n in notes] + [f"error: {p}" for p in problems]))
    return int(failed)
