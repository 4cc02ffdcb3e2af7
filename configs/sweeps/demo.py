"""The demo: pre-train a small Mask R-CNN on Shapes without labels, fine-tune it on 100 labelled
images, and compare it with random weights. About 12 minutes on two CPU cores.

    python tools/sweep.py --config configs/sweeps/demo.py --wait
    python tools/sweep.py --config configs/sweeps/demo.py --wait sweep.seeds=[0,1,2]

The learning rate of each initialisation is the best one on the held-out split, as chosen by

    python tools/sweep.py --config configs/sweeps/demo.py sweep.output_dir=output/demo_rates \\
        sweep.finetune.detector.learning_rates=[0.05,0.1,0.2] \\
        sweep.finetune.detector.learning_rate_seeds=[1000,1001]
"""

_SHAPES = "_target_:region_pretrain.data.shapes.shapes,side:96,level:clear"
_LEVEL = "dataloader.{}.dataset.names.level=clear"

sweep = dict(
    title="Demo: SoCo on Shapes",
    output_dir="output/demo",
    notes="What to expect: seeds 0 to 4 gave 34.7 to 38.5 box AP from random weights, and 3.9 to "
    "12.0 more from SoCo's, on average 6.7 (docs/shapes.md).",
    pretrain=dict(
        soco=dict(
            label="SoCo",
            config="projects/SoCo/configs/soco_r18-fpn_b32_shapes.py",
            overrides=[
                _LEVEL.format("train"),
                # The labelled boxes of the fine-tuning classify those of its validation images.
                "train.hooks=[{_target_:region_pretrain.evaluation.knn_probe.KNNProbeHook,"
                "period:0,short_edge:null,"
                f"train_names:{{{_SHAPES},split:train,size:100}},"
                f"val_names:{{{_SHAPES},split:val,size:400}}}}]",
            ],
        )
    ),
    baselines=dict(random=dict(label="random weights")),
    finetune=dict(
        detector=dict(
            config="configs/detection/mask_rcnn_r18_fpn_shapes.py",
            overrides=[
                _LEVEL.format("train"),
                _LEVEL.format("test"),
                # Norms are 1 to 6: clipped, results vary less between seeds.
                "train.clip_grad.enabled=true",
                # A scene has three objects; early checkpoints output as many detections as allowed.
                "+model.roi_heads.box_predictor.test_topk_per_image=30",
            ],
            learning_rates=[0.1],
            held_out=["+dataloader.test.dataset.names.seed=1000", "train.eval_period=0"],
        )
    ),
    pretrain_overrides=["train.device=cpu"],
    finetune_overrides=["train.device=cpu"],
    regions=dict(arguments=["--workers", "2"]),
)
