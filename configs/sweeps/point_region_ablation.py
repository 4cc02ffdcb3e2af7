"""Point-level region contrast without one of its parts, under the quick benchmark's protocol.

    python tools/sweep.py --config configs/sweeps/point_region_ablation.py --jobs 2

Rows: all of it; without negatives of the same image; with the mean of a region's points in their
place; without the distillation of affinities. One fine-tuning rate for all.
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK

_CONFIG = "projects/PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py"

sweep = benchmark(
    **{
        **QUICK,
        "title": "Point-level region contrast, part by part",
        "methods": dict(
            all=dict(label="all of it", config=_CONFIG),
            in_image=dict(
                label="no negatives of the same image",
                config=_CONFIG,
                overrides=["model.contrast.in_image=False"],
            ),
            pooled=dict(
                label="pooled regions, no points",
                config=_CONFIG,
                overrides=["model.contrast.pool=4"],
            ),
            distillation=dict(
                label="no distillation",
                config=_CONFIG,
                overrides=["model.affinity_weight=0", "dataloader.train.dataset.views.pairs=0"],
            ),
        ),
        "rates": [0.1],  # the benchmark chose it
    }
)
sweep["baselines"] = {}
