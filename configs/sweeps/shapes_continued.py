"""Continued pre-training on Shapes, from a SoCo checkpoint and from random weights.

    python tools/sweep.py --config configs/sweeps/shapes_continued.py --jobs 2

The start is SoCo after 10 epochs. Each method is pre-trained for 3 epochs three times: from the
start with the recipe of docs/starting_weights.md, from the start with its own config unchanged, and
from random weights with its own config. Seconds on one thread while both of an AMD EPYC are busy
(SoCo, CCOP, MCL, point-level, MoCo, BYOL):

    step of 32 images    0.85 + 0.42 + 1.33 + 0.90 + 0.18 + 0.30       = 4.0
    starts               2 seeds * (310 steps * 0.85 + 15 of start-up)  =   560
    pre-trainings        2 seeds * 3 * (93 steps * 4.0 + 6 * 15)        = 2,770
    regions              2 stores * 46                                  =    90
    fine-tunings         20 initialisations * 2 seeds * (200 steps * 0.26 + 10) = 2,480
                                                     sum: 5,900 / 2 threads = 49 min
"""

from .common.shapes_benchmark import benchmark
from .shapes_quick import QUICK

_START, _LENGTH = "train.epochs=10", "train.epochs=3"  # of 31 steps * 32 images/step

#: The recipe at the scale of Shapes. The target's momentum of 0.95 averages over 20 of 93 steps.
_LARS = ["optimizer.lr=0.8", "model.momentum.start=0.95"]  # 4.0 / 5
_SGD = ["optimizer.lr=0.27"]  # 0.8 / 3
RECIPE = dict(
    soco=_LARS, ccop=_SGD, mcl=_LARS, point=_SGD, moco=["optimizer.lr=0.1"], byol=_LARS  # 0.3 / 3
)
_WARMUP = "lr_multiplier.warmup_epochs=0.5"  # 15 steps; after 16 the queues are full


def _entry(method: str, words: str, overrides: list[str], **more: str) -> dict:
    entry = QUICK["methods"][method]
    return {**entry, "label": f"{entry['label']} {words}", "overrides": overrides, **more}


_methods = dict(start=_entry("soco", "(the start)", [_START]))
for _name, _overrides in RECIPE.items():
    _methods[f"{_name}_continued"] = _entry(
        _name, "from the start", [_LENGTH, _WARMUP, *_overrides], init_from="start"
    )
    _methods[f"{_name}_unchanged"] = _entry(
        _name, "from the start, unchanged config", [_LENGTH], init_from="start"
    )
    _methods[f"{_name}_random"] = _entry(_name, "from random weights", [_LENGTH])

sweep = benchmark(
    **{
        **QUICK,
        "title": "Continued pre-training on Shapes",
        "methods": _methods,
        "detector": "configs/detection/faster_rcnn_r18_fpn_shapes.py",
        "images_seen": None,
        "iterations": 200,
        "evaluations": 1,
        "learning_rates": [0.1],  # the quick benchmark's choice for 7 of 8 initialisations
    }
)
