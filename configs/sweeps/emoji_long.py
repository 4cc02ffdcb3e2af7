"""The long benchmark on emoji: validation scenes show drawings of a vendor that training never saw.

    python tools/sweep.py --config configs/sweeps/emoji_long.py --jobs 2

Methods, budgets and protocol are those of ``shapes_long.py``. The ceiling is a detector trained on
the boxes and masks of all 1,000 scenes, from which the fine-tuning starts; train it first:

    python tools/train_net.py --config-file configs/detection/mask_rcnn_r18_fpn_shapes.py \\
        dataloader.train.dataset.names._target_=region_pretrain.data.emoji.emoji \\
        dataloader.test.dataset.names._target_=region_pretrain.data.emoji.emoji \\
        dataloader.train.dataset.names.split=unlabeled dataloader.train.dataset.names.size=1000 \\
        model.roi_heads.num_classes=24 train.max_iter=1736 train.eval_period=0 train.device=cpu \\
        train.clip_grad.enabled=true lr_multiplier.max_iter=1736 lr_multiplier.steps=[1302,1592] \\
        train.output_dir=output/emoji_long_full_supervision
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG

_SUPERVISED = LONG["methods"]["supervised"]

EMOJI = {
    **LONG,
    "title": "Emoji benchmark, long",
    "data": "emoji",
    "level": "easy",
    "methods": {
        **LONG["methods"],
        "supervised": {**_SUPERVISED, "overrides": ["model.classifier.out_features=24"]},
    },
    "finetune_overrides": [*LONG["finetune_overrides"], "model.roi_heads.num_classes=24"],
}

#: The detector of the ceiling, an entry of ``baselines``.
FULL_SUPERVISION = dict(
    label="full supervision (boxes and masks of all scenes)",
    init_checkpoint="output/emoji_long_full_supervision/model_final.pth",
)

sweep = benchmark(**EMOJI)
sweep["baselines"]["full"] = FULL_SUPERVISION
