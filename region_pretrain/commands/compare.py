"""Compare fine-tunings: their AP, its differences, and the settings that should be equal.

Runs of the same weights, learning rate and settings are repetitions; runs with equal train.seed are
pairs. A sweep does all of this, and starts the runs.

Examples:

    %(prog)s output/imagenet_det output/mine_det
    %(prog)s output/random_det_seed* output/mine_det_seed*
"""

import argparse

from region_pretrain.commands import text_parser
from region_pretrain.errors import exit_on_user_error


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="output folder of a fine-tuning or an evaluation; the others are compared with the "
        "weights of the first one",
    )
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Print the tables."""
    args = make_parser(prog).parse_args(argv)
    from region_pretrain.sweeps.single_runs import compare_runs

    print(compare_runs(args.runs))
