"""The Shapes benchmark, long: 55,552 images per pre-training, 3 x 3 seeds.

    python tools/sweep.py --config configs/sweeps/shapes_long.py --jobs 2

It may be stopped at any time and continues when it is started again. The scenes are of the level
"clear". The ceiling is a detector trained on the boxes and masks of all 1,000 scenes, from which
the fine-tuning starts; train it first:

    python tools/train_net.py --config-file configs/detection/mask_rcnn_r18_fpn_shapes.py \\
        dataloader.train.dataset.names.split=unlabeled dataloader.train.dataset.names.size=1000 \\
        dataloader.train.dataset.names.level=clear dataloader.test.dataset.names.level=clear \\
        train.max_iter=1736 train.eval_period=0 train.device=cpu train.clip_grad.enabled=true \\
        lr_multiplier.max_iter=1736 lr_multiplier.steps=[1302,1592] \\
        train.output_dir=output/shapes_long_full_supervision

``docs/results/shapes_long.csv`` has the rows of its ``results.csv``; tables and figures are made by

    python tools/sweep.py tables docs/results/shapes_long.csv --reference random --reference moco \\
        --reference byol --out output/shapes_long
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK

#: Where the detector of the ceiling is expected.
FULL_SUPERVISION = "output/shapes_long_full_supervision/model_final.pth"

LONG = {
    **QUICK,
    "title": "Shapes benchmark, long",
    "level": "clear",
    "val": 1000,
    "images_seen": 55_552,  # 1,736 steps * 32 images/step = 56 ep
    "iterations": 300,  # 24 ep * 100 images/ep / 8 images/iter
    "evaluations": 1,
    "learning_rates": [0.05, 0.1, 0.2],
    "learning_rate_seeds": [1000, 1001],
    "seeds": [0, 1, 2],
    "finetune_seeds": [0, 1, 2],
    # bfloat16 needs a CPU with AVX-512 BF16 or AMX to be faster. One without AVX-512 emulates it:
    # there, sweep.pretrain_overrides.2='train.amp.enabled=false' is several times faster.
    "pretrain_overrides": [
        *QUICK["pretrain_overrides"],
        "train.amp.enabled=true",
        "train.channels_last=true",
    ],
    # The norms are 1 to 6: clipped, all steps count alike, and results vary less between seeds.
    "finetune_overrides": [*QUICK["finetune_overrides"], "train.clip_grad.enabled=true"],
}

#: For the sweeps that vary one thing of this one: the learning rate that it chose for all
#: initialisations, and one fine-tuning per pre-training.
ONE_EACH = {**LONG, "learning_rates": [0.1], "finetune_seeds": []}
#: They share this sweep's folder and its runs; the folder's report is of the one started last.
SHARED = dict(name="shapes_long", output_dir="output/sweeps/shapes_long")

sweep = benchmark(**LONG)
sweep["baselines"]["full"] = dict(
    label="full supervision (boxes and masks of all scenes)", init_checkpoint=FULL_SUPERVISION
)
