"""Small sweeps on Shapes and what their plans contain, shared by the tests of plans."""

from region_pretrain.sweeps.definition import parse_sweep

SOCO = "projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"
MOCO = "projects/MoCo/configs/moco-v2_r18_b32_shapes.py"
BYOL = "projects/BYOL/configs/byol_r18_b32_shapes.py"
DETECTOR = "configs/detection/mask_rcnn_r18_fpn_shapes.py"
RATES = {
    "learning_rates": [0.05, 0.1],
    "held_out": ["+dataloader.test.dataset.names.seed=1000"],
}


def sweep(folder, **changes):
    values = {
        "pretrain": {"soco": {"config": SOCO}},
        "finetune": {"det": {"config": DETECTOR, **RATES}},
        "images_seen": 320,
        "output_dir": str(folder),
    }
    return parse_sweep({**values, **changes}, "test")


def entries(plan, kind, **labels):
    return [
        plan.runs[e["run"]]
        for e in plan.entries
        if e["kind"] == kind and all(e[k] == v for k, v in labels.items())
    ]


def overrides(run, task=0):
    return dict(a.lstrip("+").split("=", 1) for a in run.tasks[task] if "=" in a)
