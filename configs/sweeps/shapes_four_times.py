"""AP after a quarter and after four times the pre-training of shapes_long.py.

    python tools/sweep.py --config configs/sweeps/shapes_four_times.py --jobs 2

Fine-tuned for 900 steps, after which little of the AP is due to a faster start. The pre-trainings
of the usual length are those of ``shapes_long.py``: the sweep uses the folder of that sweep, with
the runs that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_lengths import SHORTER, of_length
from .shapes_long import LONG, SHARED
from .shapes_quick import SELF_SUPERVISED

sweep = {
    **benchmark(
        **{
            **LONG,
            "title": "Shapes benchmark: AP after a quarter and four times the pre-training",
            "methods": {
                **SELF_SUPERVISED,
                **of_length("quarter", SHORTER["quarter"]),
                **of_length("four_times", 222_208),  # 6,944 steps * 32 images/step
            },
            "learning_rates": [0.1],
            "iterations": 900,
            "seeds": [7],
            "finetune_seeds": [0, 1],
        }
    ),
    **SHARED,
}
