"""The Shapes benchmark on a CPU, as a regression test: less than 40 minutes on two cores.

    python tools/sweep.py --config configs/sweeps/shapes_quick.py --jobs 2

Seconds on one thread while two threads of an AMD EPYC are busy (SoCo, CCOP, MCL, supervised MCL,
MoCo, BYOL):

    step of 32 images    0.79 + 0.41 + 1.32 + 0.97 + 0.16 + 0.26            = 3.9
    pre-trainings        2 seeds * (128 steps * 3.9 + 6 * 8 s of start-up)  = 1,100
    regions              2 stores * 46                                      =    92
    one fine-tuning      150 steps * 0.40 + 8 s of start-up + 9 s/evaluation
                         = 77 with one evaluation, 86 with two
    fine-tunings         7 initialisations * (2 learning rates * 77 + 2 seeds * 86 + 4) = 2,310
                                                                sum: 3,500 / 2 threads = 29 min
"""

from .common.shapes_benchmark import benchmark

#: The methods that need no labels, as entries of a sweep.
SELF_SUPERVISED = dict(
    moco=dict(label="MoCo v2", config="projects/MoCo/configs/moco-v2_r18_b32_shapes.py"),
    byol=dict(label="BYOL", config="projects/BYOL/configs/byol_r18_b32_shapes.py"),
    soco=dict(label="SoCo", config="projects/SoCo/configs/soco_r18-fpn_b32_shapes.py"),
    ccop=dict(label="CCOP", config="projects/CCOP/configs/ccop_r18-fpn_b32_shapes.py"),
    mcl=dict(label="MCL", config="projects/MCL/configs/mcl_r18-fpn_b32_shapes.py"),
    point=dict(
        label="point-level region contrast",
        config="projects/PointRegionContrast/configs/point-region_r18-fpn_b32_shapes.py",
    ),
)

#: Arguments of the benchmark, shared with shapes_medium.py and point_region_ablation.py.
QUICK = dict(
    title="Shapes benchmark, quick size",
    methods=dict(
        supervised=dict(
            label="supervised MCL (labels of all scenes)",
            config="projects/MCL/configs/mcl-supervised_r18-fpn_b32_shapes.py",
            data="dataloader.train.dataset.names.names",
        ),
        **SELF_SUPERVISED,
    ),
    detector="configs/detection/mask_rcnn_r18_fpn_shapes.py",
    side=96,
    level="easy",
    unlabeled=1000,
    labelled=100,
    val=200,
    images_seen=4096,  # 128 steps * 32 images/step
    iterations=150,  # 12 ep * 100 images/ep / 8 images/iter
    evaluations=2,
    learning_rates=[0.05, 0.1],
    label_fractions=[1.0],
    seeds=[0, 1],
    pretrain_overrides=["train.device=cpu", "dataloader.train.num_workers=0"],
    finetune_overrides=[
        "train.device=cpu",
        "dataloader.train.num_workers=0",
        # A scene has three objects; early checkpoints output as many detections as allowed.
        "+model.roi_heads.box_predictor.test_topk_per_image=30",
    ],
)

sweep = benchmark(**QUICK)
