"""Does the gain last when the fine-tuning is three times as long? On Shapes.

    python tools/sweep.py --config configs/sweeps/shapes_steps.py --jobs 2

As ``shapes_long.py``, with 300 and with 900 steps on the same 100 labelled scenes, and BYOL and MCL
also with twice their learning rate, which the trials of ``shapes_settings.py`` choose. The sweep
uses the folder of the long one, with the runs that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG, SHARED
from .shapes_quick import SELF_SUPERVISED
from .shapes_settings import SETTINGS

#: Fine-tuning iterations; the first are those of the long size.
ITERATIONS = [300, 900]

_TUNED = {name: SETTINGS[name] for name in ("byol_twice", "mcl_twice")}
_sweeps = {
    iterations: benchmark(
        **{
            **LONG,
            "title": "Shapes benchmark: AP against the length of fine-tuning",
            "methods": {**SELF_SUPERVISED, **_TUNED},
            "learning_rates": [0.1],
            "iterations": iterations,
        }
    )
    for iterations in ITERATIONS
}
sweep = {
    **_sweeps[ITERATIONS[0]],
    **SHARED,
    "finetune": {f"steps{n}": one["finetune"]["detector"] for n, one in _sweeps.items()},
}
