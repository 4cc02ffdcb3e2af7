"""Results of the settings that shapes_settings.py chose, in the protocol of shapes_long.py.

    python tools/sweep.py --config configs/sweeps/shapes_chosen.py --jobs 2

It uses the folder of ``shapes_settings.py``, with the pre-trainings that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG, ONE_EACH
from .shapes_settings import SETTINGS

sweep = benchmark(
    **{
        **ONE_EACH,
        "title": "Shapes benchmark: chosen settings",
        "methods": {name: SETTINGS[name] for name in ("point_warm", "byol_twice")},
        "finetune_seeds": LONG["finetune_seeds"],
    }
)
sweep["baselines"] = {}
sweep.update(name="shapes_settings", output_dir="output/sweeps/shapes_settings")
