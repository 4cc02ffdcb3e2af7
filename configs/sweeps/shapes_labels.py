"""AP against the number of labelled scenes: how many labels are SoCo and MCL worth on Shapes?

    python tools/sweep.py --config configs/sweeps/shapes_labels.py --jobs 2

The pre-trainings are those of ``shapes_long.py``: the sweep uses the folder of that sweep, with the
runs that it has. The seed also selects the labelled scenes out of 1,000.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG, ONE_EACH, SHARED

#: Labelled scenes -> fine-tuning iterations, the same for every initialisation.
ITERATIONS = {25: 300, 50: 300, 100: 300, 200: 300, 400: 600, 1000: 900}


def _sweep(labelled: int, iterations: int) -> dict:
    return benchmark(
        **{
            **ONE_EACH,
            "title": "Shapes benchmark: AP against the number of labels",
            "methods": {name: LONG["methods"][name] for name in ("soco", "mcl")},
            "labelled": 1000,
            "label_fractions": [labelled / 1000],
            "iterations": iterations,
        }
    )


_sweeps = {n: _sweep(n, iterations) for n, iterations in ITERATIONS.items()}
sweep = {
    **_sweeps[100],
    **SHARED,
    "finetune": {f"labels{n}": one["finetune"]["detector"] for n, one in _sweeps.items()},
}
