"""AP against the images seen in pre-training: a sixteenth, a quarter and all of shapes_long.py's.

    python tools/sweep.py --config configs/sweeps/shapes_lengths.py --jobs 2

The longest pre-trainings are those of ``shapes_long.py``: the sweep uses the folder of that sweep,
with the runs that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import ONE_EACH, SHARED
from .shapes_quick import SELF_SUPERVISED

#: Suffix of the names -> images seen: 109 and 434 steps * 32 images/step.
SHORTER = {"sixteenth": 3_488, "quarter": 13_888}


def of_length(suffix: str, images: int) -> dict:
    """Pre-trainings of every method that see ``images`` images; their names end in ``suffix``."""
    return {
        f"{name}_{suffix}": {
            **entry,
            "label": f"{entry['label']}, {images:,} images",
            "method": entry["label"],
            "images_seen": images,
        }
        for name, entry in SELF_SUPERVISED.items()
    }


_SHORTER = {
    name: entry
    for suffix, images in SHORTER.items()
    for name, entry in of_length(suffix, images).items()
}

#: Arguments of the benchmark, shared with shapes_probes.py.
LENGTHS = {
    **ONE_EACH,
    "title": "Shapes benchmark: AP against the images seen in pre-training",
    "methods": {**SELF_SUPERVISED, **_SHORTER},
}

sweep = {**benchmark(**LENGTHS), **SHARED}
