"""Classify labelled regions by kNN and by a linear classifier on frozen features, without training.

The regions are the ground-truth boxes of the config's training and test data. A table with one line
per level (trunk, pooled maps, heads) is printed and written to probe.json in train.output_dir.
"""

import argparse

from region_pretrain.commands import text_parser
from region_pretrain.engine.command_line import launch_with_config
from region_pretrain.errors import exit_on_user_error
from region_pretrain.evaluation.probe import do_probe

EXAMPLES = """
Examples:

A checkpoint in the detector that it is for, on the data that the config names:
    %(prog)s --config-file configs/detection/mask_rcnn_r50_fpn_4conv1fc.py \\
        train.init_checkpoint=output/mine/model_final.pth train.output_dir=output/mine_probe

A detector of Detectron2's model zoo with the weights that its config names:
    %(prog)s --config-file COCO-Detection/retinanet_R_50_FPN_1x.yaml --max-images 1000
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = text_parser(prog, __doc__)
    parser.epilog = EXAMPLES
    parser.add_argument(
        "--config-file",
        metavar="FILE",
        required=True,
        help="a detection config: a LazyConfig (.py), the config.yaml of a run, a yacs config "
        "(.yaml), or a name in Detectron2's model zoo",
    )
    parser.add_argument("--k", type=int, default=20, help="number of neighbours (default 20)")
    parser.add_argument(
        "--max-images",
        type=int,
        default=5000,
        help="images of each split, spread evenly over it; 0: all (default 5000)",
    )
    parser.add_argument("--num-gpus", type=int, default=1, help="processes (default 1)")
    parser.add_argument(
        "opts",
        nargs="*",
        metavar="key=value",
        help="config overrides; train.init_checkpoint are the weights, without it they are random",
    )
    parser.set_defaults(num_machines=1, machine_rank=0, dist_url="auto")
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Probe the config's detector."""
    args = make_parser(prog).parse_intermixed_args(argv)
    launch_with_config(args, do_probe, args.k, args.max_images or None)
