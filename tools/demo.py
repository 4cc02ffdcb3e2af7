#!/usr/bin/env python
"""The main job on Shapes, on a CPU: regions, pre-training, fine-tuning from scratch and from the
pre-trained weights; then a table, results.json and report.html.

    python tools/demo.py                   # one seed
    python tools/demo.py --seeds 0 1 2     # mean and standard deviation
    python tools/demo.py --sweep           # the fine-tuning learning rates that it uses
"""

import argparse

from region_pretrain.warnings import ignore_library_warnings

ignore_library_warnings()

from region_pretrain.errors import exit_on_user_error
from region_pretrain.sweeps.demo import (
    PRETRAINED_LR,
    SCRATCH_LR,
    run_demo,
    run_sweep,
)

PRETRAIN_CONFIG = "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"
DETECTION_CONFIG = "configs/detection/mask_rcnn_r18_fpn_shapes.py"


@exit_on_user_error
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", default="output/demo", help="default output/demo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="default 0")
    parser.add_argument("--lr-scratch", type=float, default=SCRATCH_LR, help="%(default)s")
    parser.add_argument("--lr-pretrained", type=float, default=PRETRAINED_LR, help="%(default)s")
    parser.add_argument("--sweep", action="store_true", help="try learning rates, of one seed")
    parser.add_argument("--quick", action="store_true", help="tiny: shows only that it runs")
    args = parser.parse_args()
    configs = PRETRAIN_CONFIG, DETECTION_CONFIG, args.output_dir
    if args.sweep:
        run_sweep(*configs, seed=args.seeds[0], quick=args.quick)
    else:
        run_demo(*configs, args.seeds, args.lr_scratch, args.lr_pretrained, quick=args.quick)


if __name__ == "__main__":
    main()
