"""AP against the number of labelled scenes: how many labels is a pre-training worth on Shapes?

    python tools/sweep.py --config configs/sweeps/shapes_labels.py --jobs 2

Every fine-tuning has the 900 steps of ``shapes_steps.py``, whatever the number of scenes. The
fine-tuning seed also selects the scenes out of 1,000. The pre-trainings are those of
``shapes_long.py`` and ``shapes_settings.py``: the sweep uses the folder of the former, with the
runs that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG, ONE_EACH, SHARED
from .shapes_settings import SETTINGS

#: Labelled scenes.
COUNTS = [25, 50, 100, 200, 400, 1000]

sweep = {
    **benchmark(
        **{
            **ONE_EACH,
            "title": "Shapes benchmark: AP against the number of labels",
            "methods": {
                "byol_twice": SETTINGS["byol_twice"],
                "ccop": LONG["methods"]["ccop"],
                "mcl_twice": SETTINGS["mcl_twice"],
            },
            "labelled": 1000,
            "label_fractions": [n / 1000 for n in COUNTS],
            "iterations": 900,
            "finetune_seeds": [0, 1],
        }
    ),
    **SHARED,
}
