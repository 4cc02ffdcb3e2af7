"""The emoji benchmark with 900 steps of fine-tuning instead of 300.

    python tools/sweep.py --config configs/sweeps/emoji_steps.py --jobs 2

As ``emoji_long.py``, whose folder and runs the sweep uses. BYOL and MCL are also pre-trained with
twice their learning rate, which the trials of ``shapes_settings.py`` chose on Shapes. The ceiling
is trained first, as for ``emoji_long.py``.
"""

from .common.shapes_benchmark import benchmark
from .emoji_long import EMOJI, FULL_SUPERVISION
from .shapes_settings import SETTINGS

_TUNED = {name: SETTINGS[name] for name in ("byol_twice", "mcl_twice")}

sweep = {
    **benchmark(
        **{
            **EMOJI,
            "title": "Emoji benchmark: 900 steps of fine-tuning",
            "methods": {**EMOJI["methods"], **_TUNED},
            "learning_rates": [0.1],  # chosen on Shapes
            "finetune_seeds": [0, 1],
            "iterations": 900,
        }
    ),
    "name": "emoji_long",
    "output_dir": "output/sweeps/emoji_long",
}
sweep["baselines"]["full"] = FULL_SUPERVISION
