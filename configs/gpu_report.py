"""The recipes that ``tools/benchmark.py --gpu-report`` measures: one per method."""

report = dict(
    configs=[
        "projects/MoCo/configs/moco-v2_r50_8xb32-200ep_imagenet.py",
        "projects/BYOL/configs/byol_r50_32xb128-100ep_imagenet.py",
        "projects/SoCo/configs/soco_r50-fpn_16xb128-100ep_imagenet.py",
        "projects/CCOP/configs/ccop_r50-fpn_8xb32-200ep_coco.py",
        "projects/MCL/configs/mcl_r50-fpn_32xb128-100ep_imagenet.py",
        "projects/PointRegionContrast/configs/point-region_r50-fpn_8xb32-200ep_imagenet.py",
    ]
)
