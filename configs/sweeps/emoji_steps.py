"""The emoji benchmark with 900 steps of fine-tuning instead of 300.

    python tools/sweep.py --config configs/sweeps/emoji_steps.py --jobs 2

As ``emoji_long.py``, whose folder and runs the sweep uses.
"""

from .common.shapes_benchmark import benchmark
from .emoji_long import EMOJI

sweep = {
    **benchmark(
        **{
            **EMOJI,
            "title": "Emoji benchmark: 900 steps of fine-tuning",
            "methods": {k: v for k, v in EMOJI["methods"].items() if k != "supervised"},
            "learning_rates": [0.1],  # chosen on Shapes
            "finetune_seeds": [0, 1],
            "iterations": 900,
        }
    ),
    "name": "emoji_long",
    "output_dir": "output/sweeps/emoji_long",
}
