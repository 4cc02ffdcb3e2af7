"""Trials of the methods' own settings on the held-out scenes of the long Shapes benchmark.

    python tools/sweep.py --config configs/sweeps/shapes_settings.py --jobs 2

All methods are pre-trained twice with their own settings, with half and twice the learning rate
(BYOL and MCL, which gain by twice theirs, also with four times), and MoCo v2, CCOP and point-level
region contrast with the temperature of the recipes for photographs; CCOP and point-level region
contrast also with the boxes of another search, SoCo with the crops of BYOL, which are smaller than
its own. CCOP, point-level region contrast and SoCo are pre-trained on annotated boxes as well, an
upper bound of the regions' quality and not a choice; the methods with a queue with batch norm over
8 images instead of all 32. Each pre-training is fine-tuned once with 300 and once with 900 steps,
with a seed that the results do not use.
"""

from .common.shapes_benchmark import HELD_OUT_SEED, benchmark
from .shapes_long import LONG, ONE_EACH

_DATA = "dataloader.train.dataset"
_ANNOTATED = [f"{_DATA}.recipe=ground_truth-v1", f"{_DATA}.allow_ground_truth=true"]
# The sweep replaces the path by that of the store that it generates.
_BOXES = [f"{_DATA}.views.maps.kind=boxes", f"{_DATA}.regions=made_by_the_sweep"]


def variant(name: str, label: str, *overrides: str) -> dict:
    """A method of the long benchmark with other settings.

    Args:
        name: the method there.
        label: what differs.
        overrides: of its config.
    """
    entry = LONG["methods"][name]
    own = [*entry.get("overrides", []), *overrides]
    return {**entry, "label": f"{entry['label']}, {label}", "overrides": own}


_FACTORS = {"half": 0.5, "twice": 2, "four": 4}


def _rates(name: str, rate: float, factors: tuple = ("half", "twice")) -> dict:
    return {
        name: variant(name, "own settings"),
        **{
            f"{name}_{k}": variant(
                name, f"learning rate x {_FACTORS[k]}", f"optimizer.lr={rate * _FACTORS[k]:g}"
            )
            for k in factors
        },
    }


SETTINGS = {
    **_rates("ccop", 0.8),
    "ccop_warm": variant("ccop", "temperature 0.2", "model.temperature=0.2"),
    "ccop_boxes": variant("ccop", "regions shapes-v1", f"{_DATA}.recipe=shapes-v1"),
    "ccop_annotated": variant("ccop", "annotated boxes", *_ANNOTATED),
    **_rates("point", 0.8),
    "point_warm": variant("point", "temperature 0.2", "model.temperature=0.2"),
    "point_boxes": variant("point", "regions shapes-v1", *_BOXES, f"{_DATA}.recipe=shapes-v1"),
    "point_annotated": variant("point", "annotated boxes", *_BOXES, *_ANNOTATED),
    **_rates("byol", 4.0, ("half", "twice", "four")),
    **_rates("soco", 4.0),
    "soco_crops": variant("soco", "crops of BYOL", f"{_DATA}.views.crop_area=[0.2,1.0]"),
    **_rates("mcl", 4.0, ("half", "twice", "four")),
    **_rates("moco", 0.3),
    "moco_warm": variant("moco", "temperature 0.2", "model.temperature=0.2"),
    **{
        f"{name}_groups": variant(name, "batch norm over 8 images", "model.norm_batch_size=8")
        for name in ("ccop", "point", "moco")
    },
    "soco_annotated": variant("soco", "annotated boxes", *_ANNOTATED),
}


def _trials(iterations: int) -> dict:
    one = benchmark(
        **{
            **ONE_EACH,
            "title": "Shapes benchmark: settings of the methods on held-out scenes",
            "methods": SETTINGS,
            "seeds": [0, 1],
            "finetune_seeds": [HELD_OUT_SEED],
            "iterations": iterations,
        }
    )
    entry = one["finetune"]["detector"]
    entry["overrides"] = [*entry["overrides"], *entry["held_out"]]
    return one


sweep = _trials(300)
sweep["finetune"] = {
    "held_out": sweep["finetune"]["detector"],
    "held_out900": _trials(900)["finetune"]["detector"],
}
sweep["baselines"] = {}
