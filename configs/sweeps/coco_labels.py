"""SoCo and MCL on COCO, fine-tuned on 1, 2, 5 and 10 % of its labelled images.

    python tools/sweep.py --config configs/sweeps/coco_labels.py --slurm \\
        partition=gpu,nodes=2,gpus-per-node=8,cpus-per-task=12,finetune.nodes=1,finetune.gpus-per-node=4

Two pre-trainings on train2017 and unlabeled2017, and 48 fine-tunings: from these, from random and
from supervised ImageNet weights, with three seeds, which select the images. COCO is expected in
``$DETECTRON2_DATASETS/coco``; it has not been run on it yet.
"""

_FINETUNE = "configs/detection/mask_rcnn_r50_fpn_4conv1fc.py"

#: Percent of the 117,266 labelled images -> iterations of 16 images. Those of 5 and 10 % are
#: SoCo's; fewer labels need more epochs.
ITERATIONS = {1: 3_000, 2: 4_000, 5: 5_500, 10: 10_000}  # 41, 27, 15.0 and 13.6 ep


def _finetune(percent: int, iterations: int) -> dict:
    return dict(
        config=_FINETUNE,
        label_fractions=[percent / 100],
        seeds=[0, 1, 2],
        overrides=[
            f"train.max_iter={iterations}",
            "train.eval_period=0",
            "train.clip_grad.enabled=true",
            # 500 iterations, of a schedule that the config gives as 90,000.
            f"+lr_multiplier.warmup_iters={500 * 90_000 // iterations}",
        ],
    )


sweep = dict(
    title="COCO: AP against the number of labels",
    seeds=[0],
    pretrain=dict(
        soco=dict(label="SoCo", config="projects/SoCo/configs/soco_r50-fpn_16xb128-530ep_coco.py"),
        mcl=dict(label="MCL", config="projects/MCL/configs/mcl_r50-fpn_32xb128-530ep_coco.py"),
    ),
    baselines=dict(
        random=dict(label="random weights"),
        imagenet=dict(
            label="supervised ImageNet",
            init_checkpoint="detectron2://ImageNetPretrained/torchvision/R-50.pkl",
        ),
    ),
    finetune={f"labels{n}": _finetune(n, iterations) for n, iterations in ITERATIONS.items()},
    regions=dict(shards=64, arguments=["--workers", "12"]),
)
