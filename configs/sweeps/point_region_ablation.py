"""Ablation of point-level region contrast, with the quick benchmark's protocol.

    python tools/sweep.py --config configs/sweeps/point_region_ablation.py --jobs 2

Rows: the full method; without negatives from the same image; contrasting the mean of each region's
points instead of the points; without affinity distillation. All use one fine-tuning learning rate.
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK

_CONFIG = "projects/PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py"

sweep = benchmark(
    **{
        **QUICK,
        "title": "Ablation of point-level region contrast",
        "methods": dict(
            all=dict(label="full method", config=_CONFIG),
            in_image=dict(
                label="no negatives from the same image",
                config=_CONFIG,
                overrides=["model.contrast.in_image=False"],
            ),
            pooled=dict(
                label="pooled regions instead of points",
                config=_CONFIG,
                overrides=["model.contrast.pool=4"],
            ),
            distillation=dict(
                label="no affinity distillation",
                config=_CONFIG,
                overrides=["model.affinity_weight=0", "dataloader.train.dataset.views.pairs=0"],
            ),
        ),
        "learning_rates": [0.1],  # chosen by the benchmark
    }
)
sweep["baselines"] = {}
