"""Which probe of a checkpoint predicts its AP: the checkpoints of shapes_lengths.py.

    python tools/sweep.py --config configs/sweeps/shapes_probes.py --jobs 2 --wait
    python tools/sweep.py probes output/sweeps/shapes_long

Beside the probes of ``tools/probe.py``, a detector with a frozen trunk is trained for
100 steps and evaluated on 300 scenes.
"""

from .common.shapes_benchmark import benchmark
from .shapes_lengths import LENGTHS
from .shapes_long import SHARED

sweep = {**benchmark(**{**LENGTHS, "title": "Shapes benchmark: probes"}), **SHARED}
_frozen = benchmark(**{**LENGTHS, "iterations": 100, "val": 300})["finetune"]["detector"]
_frozen["overrides"].append("train.freeze=[backbone.bottom_up]")
sweep["finetune"]["frozen_trunk"] = _frozen
