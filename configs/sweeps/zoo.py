"""Small weights of every method for ``make zoo``: 23 minutes of one thread on a busy machine.

    python tools/sweep.py --config configs/sweeps/zoo.py --jobs 2 --wait
    python tools/sweep.py zoo output/sweeps/zoo

They are for trying out what loads weights, not for comparing methods: 64 steps of pre-training.
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK, SELF_SUPERVISED

sweep = benchmark(
    **{
        **QUICK,
        "title": "Zoo of small weights",
        "methods": SELF_SUPERVISED,
        "unlabeled": 500,
        "val": 100,
        "images_seen": 2048,  # 64 steps * 32 images/step
        "iterations": 100,
        "evaluations": 1,
        "learning_rates": [0.05],
        "seeds": [0],
    }
)
