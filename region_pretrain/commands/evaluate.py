"""Evaluate a detector on the test data of its config, without training."""

from __future__ import annotations

import argparse

from region_pretrain.commands import program
from region_pretrain.engine.command_line import argument_parser, launch_with_config
from region_pretrain.engine.finetune import do_evaluate
from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training, wants_slurm

EXAMPLES = """
Examples:

Evaluate the result of a fine-tuning, on the test data that its config names or on other data:
    %(prog)s --config-file configs/detection/mask_rcnn_r18_fpn_shapes.py \\
        train.init_checkpoint=output/mine_det/model_final.pth train.output_dir=output/mine_eval
    %(prog)s --config-file configs/detection/mask_rcnn_r50_fpn_4conv1fc.py \\
        train.init_checkpoint=output/mine_det/model_final.pth train.output_dir=output/mine_eval \\
        'dataloader.test.dataset.names=coco://test.json?images=DIR'
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    parser = argument_parser(__doc__, prog=program(prog), examples=EXAMPLES)
    for action in parser._actions:
        if action.dest in ("resume", "eval_only"):
            action.help = argparse.SUPPRESS  # an evaluation has nothing to resume
    add_slurm_arguments(parser)
    parser.set_defaults(eval_only=True)
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Evaluate ``train.init_checkpoint``."""
    args = make_parser(prog).parse_intermixed_args(argv)
    if wants_slurm(args):
        submit_training(args, "tools/train_net.py")
    else:
        launch_with_config(args, do_evaluate)
