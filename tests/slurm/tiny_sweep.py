from region_pretrain.sweeps.demo import _QUICK_DETECTION, _QUICK_PRETRAIN

_BREAK = "train.hooks=[{_target_:slurm_runs.BreakAt,iteration:1,rank:0}]"

sweep = dict(
    seeds=[0, 1],
    pretrain=dict(
        byol=dict(config="projects/BYOL/configs/byol_r18_b32_shapes.py", label="BYOL"),
        moco=dict(config="projects/MoCo/configs/moco-v2_r18_b32_shapes.py", label="MoCo v2"),
        broken=dict(config="projects/BYOL/configs/byol_r18_b32_shapes.py", overrides=[_BREAK]),
    ),
    finetune=dict(det=dict(config="configs/detection/mask_rcnn_r18_fpn_shapes.py")),
    pretrain_overrides=["train.device=cpu", *_QUICK_PRETRAIN],
    finetune_overrides=["train.device=cpu", *_QUICK_DETECTION],
)
