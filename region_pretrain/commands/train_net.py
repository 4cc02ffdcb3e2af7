"""Fine-tune a detector, from pre-trained or random weights, and evaluate it."""

from region_pretrain.engine.command_line import argument_parser, launch_with_config
from region_pretrain.engine.finetune import do_evaluate, do_train
from region_pretrain.errors import exit_on_user_error
from region_pretrain.jobs.submission import add_slurm_arguments, submit_training, wants_slurm


@exit_on_user_error
def main() -> None:
    parser = argument_parser(__doc__, "configs/detection/mask_rcnn_r50_fpn_4conv1fc.py")
    add_slurm_arguments(parser)
    args = parser.parse_intermixed_args()
    if wants_slurm(args):
        submit_training(args, "tools/train_net.py")
    elif args.eval_only:
        launch_with_config(args, do_evaluate)
    else:
        launch_with_config(args, do_train, args.resume)
