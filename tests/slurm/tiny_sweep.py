"""A sweep of two methods and a third that fails, as small as possible."""

_QUICK_PRETRAIN = (
    "dataloader.train.dataset.names.size=24",
    "dataloader.train.total_batch_size=8",
    "dataloader.train.num_workers=0",
    "train.max_iter=4",
    "train.log_period=1",
)
_QUICK_DETECTION = (
    "dataloader.train.dataset.names.size=16",
    "dataloader.train.total_batch_size=4",
    "dataloader.train.num_workers=0",
    "dataloader.test.dataset.names.size=8",
    "train.max_iter=4",
    "train.eval_period=2",
    "train.log_period=1",
)
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
