"""Write a detector's weights for another library, and print the configuration that they need.

Examples:

    %(prog)s output/mine --to torchvision
    %(prog)s output/mine/model_0009999.pth --to detectron2 --out detector.pkl
"""

import argparse

from region_pretrain.commands import text_parser
from region_pretrain.convert.export import TARGETS, write_export
from region_pretrain.errors import exit_on_user_error


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.add_argument(
        "checkpoint", metavar="RUN", help="output folder with model_final.pth, or a checkpoint"
    )
    parser.add_argument("--to", required=True, choices=TARGETS, help="the target library")
    parser.add_argument(
        "--out",
        metavar="FILE",
        help="default: <checkpoint>_<to>.pth or .safetensors; detectron2's may also be a .pkl",
    )
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Write the weights, and print the configuration."""
    args = make_parser(prog).parse_args(argv)
    out, lines = write_export(args.checkpoint, args.to, args.out)
    print(f"# {out}")
    print("\n".join(lines))
