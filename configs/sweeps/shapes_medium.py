"""The Shapes benchmark on a CPU, with three times the quick size's pre-training and twice its
fine-tuning: 75 minutes on two cores.

    python tools/sweep.py --config configs/sweeps/shapes_medium.py --jobs 2

It leaves out supervised MCL, which would add an estimated 15 minutes.
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK, SELF_SUPERVISED

sweep = benchmark(
    **{
        **QUICK,
        "title": "Shapes benchmark, medium size",
        "methods": SELF_SUPERVISED,
        "images_seen": 13_888,  # 434 steps * 32 images/step
        "iterations": 300,
        "evaluations": 3,
    }
)
