"""The upper bound of better regions: region methods pre-trained on the annotated boxes of Shapes.

    python tools/sweep.py --config configs/sweeps/shapes_regions.py --jobs 2

Each pre-training is fine-tuned with 300 and with 900 steps.
Point-level region contrast, which has a grid in the benchmark, is also trained on the boxes of
selective search. MCL has no regions. The pre-trainings on the benchmark's own regions are those of
``shapes_long.py``: the sweep uses the folder of that sweep, with the runs that it has.
"""

from .common.shapes_benchmark import benchmark
from .shapes_long import LONG, ONE_EACH, SHARED

_DATA = "dataloader.train.dataset"
_ANNOTATED = [f"{_DATA}.recipe=ground_truth-v1", f"{_DATA}.allow_ground_truth=true"]
# The sweep replaces the path by that of the store that it generates.
_BOXES = [f"{_DATA}.views.maps.kind=boxes", f"{_DATA}.regions=made_by_the_sweep"]


def _variant(name: str, regions: str, overrides: list) -> dict:
    entry = LONG["methods"][name]
    return {**entry, "label": f"{entry['label']}, {regions}", "overrides": overrides}


_OWN = {name: LONG["methods"][name] for name in ("soco", "ccop", "point")}


def _benchmark(iterations: int) -> dict:
    return benchmark(
        **{
            **ONE_EACH,
            "title": "Shapes benchmark: annotated boxes as regions",
            "iterations": iterations,
            "methods": {
                **_OWN,
                "point_boxes": _variant(
                    "point", "selective search", [*_BOXES, f"{_DATA}.recipe=shapes-v1"]
                ),
                "soco_annotated": _variant("soco", "annotated boxes", _ANNOTATED),
                "ccop_annotated": _variant("ccop", "annotated boxes", _ANNOTATED),
                "point_annotated": _variant("point", "annotated boxes", [*_BOXES, *_ANNOTATED]),
            },
        }
    )


sweep = {**_benchmark(LONG["iterations"]), **SHARED}
sweep["finetune"]["steps900"] = _benchmark(900)["finetune"]["detector"]
