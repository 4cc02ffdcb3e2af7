"""Pre-train a detector on unlabelled images.

With --config-file, or with --method and the detector's own config:

    %(prog)s --method soco --detector configs/detection/mask_rcnn_r50_fpn_4conv1fc.py \\
        dataloader.train.dataset.names=folder://DIR dataloader.train.dataset.regions=regions.arrow
"""

from __future__ import annotations

import argparse

from region_pretrain.commands import program
from region_pretrain.engine.command_line import (
    argument_parser,
    launch_with_config,
    training_examples,
)
from region_pretrain.engine.methods import add_method_arguments
from region_pretrain.engine.pretrain import do_pretrain
from region_pretrain.errors import UserError, exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training, wants_slurm


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    """The command line's parser."""
    examples = training_examples("projects/SoCo/configs/soco_r18-fpn_b32_shapes.py")
    parser = argument_parser(__doc__, examples, program(prog))
    next(a for a in parser._actions if a.dest == "eval_only").help = argparse.SUPPRESS
    add_method_arguments(parser)
    add_slurm_arguments(parser)
    return parser


@exit_on_user_error
def main(argv: list[str] | None = None, prog: str | None = None) -> None:
    """Run or submit a pre-training."""
    args = make_parser(prog).parse_intermixed_args(argv)
    if args.eval_only:
        raise UserError(
            "--eval-only is for region-pretrain finetune: pre-training has no evaluation"
        )
    if wants_slurm(args):
        submit_training(args, "tools/pretrain_net.py")
    else:
        launch_with_config(args, do_pretrain, args.resume)
