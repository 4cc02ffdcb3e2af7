"""The Shapes benchmark on one GPU: ResNet-50-FPN, 256-pixel scenes.

    python tools/sweep.py --config configs/sweeps/shapes_full.py --jobs 3

Each method uses its ImageNet or COCO recipe, adapted to 150 steps as in its config for the small
detector: momentum networks must adapt within dozens of steps, a queue must not contain the same
image many times, and embeddings must differ from the beginning, which takes norms in the heads and
residual blocks that contribute.

    pre-training    2 seeds * 7 methods * 150 steps of 128 images
    fine-tuning     8 initialisations * (2 learning rates + 2 seeds) * 300 steps of 16 images
"""

from .common.shapes_benchmark import benchmark

_IMAGE_DATA = "dataloader.train.dataset"
_MOMENTUM = "model.momentum.start=0.97"

sweep = benchmark(
    title="Shapes benchmark, full size",
    methods=dict(
        supervised=dict(
            label="supervised MCL (labels of all scenes)",
            config="projects/MCL/configs/mcl-supervised_r50-fpn_32xb128-100ep_imagenet.py",
            overrides=[
                f"{_IMAGE_DATA}.names="
                "{_target_:region_pretrain.projects.mcl.objects.object_crops,names:null,context:1.5}",
                f"{_IMAGE_DATA}.views.crop_area=[0.5,1.0]",
                "model.classifier.out_features=8",
            ],
            data=f"{_IMAGE_DATA}.names.names",
        ),
        moco=dict(
            label="MoCo v2",
            config="projects/MoCo/configs/moco-v2_r50_8xb32-200ep_imagenet.py",
            overrides=[
                "model.queue.length=1024",
                "model.momentum.value=0.99",
                "model.head.norm=SyncBN",
                "model.temperature=0.1",
            ],
        ),
        byol=dict(
            label="BYOL",
            config="projects/BYOL/configs/byol_r50_32xb128-300ep_imagenet.py",
            overrides=[_MOMENTUM, "model.zero_init=false", "optimizer.lr=1.0"],
        ),
        soco=dict(
            label="SoCo",
            config="projects/SoCo/configs/soco_r50-fpn_8xb128-100ep_imagenet.py",
            overrides=[_MOMENTUM, f"{_IMAGE_DATA}.recipe=shapes-v1"],
        ),
        ccop=dict(
            label="CCOP",
            config="projects/CCOP/configs/ccop_r50-fpn_8xb32-200ep_coco.py",
            overrides=[
                "model.momentum.value=0.99",
                "model.temperature=0.1",
                "model.image_queue.length=1024",
                "model.region_queue.length=16384",
                "model.image_head.init_std=null",
                "model.region_head.init_std=null",
                "model.image_head.norm=SyncBN",
                "model.region_head.norm=SyncBN",
            ],
        ),
        mcl=dict(
            label="MCL",
            config="projects/MCL/configs/mcl_r50-fpn_8xb128-100ep_imagenet.py",
            overrides=[_MOMENTUM],
        ),
        point=dict(
            label="point-level region contrast",
            config="projects/PointRegionContrast/configs/point-region_r50_8xb32-200ep_imagenet.py",
            overrides=[
                "model.queue.length=1024",
                "model.momentum.value=0.99",
                "model.head.norm=SyncBN",
                "model.temperature=0.1",
                "model.zero_init=false",
                "optimizer.lr=0.2",
            ],
        ),
    ),
    detector="configs/detection/mask_rcnn_r50_fpn_4conv1fc.py",
    side=256,
    level="easy",
    unlabeled=2000,
    labelled=500,
    val=300,
    images_seen=19_200,  # 150 steps * 128 images/step = 9.6 ep
    iterations=300,  # 9.6 ep * 500 images/ep / 16 images/iter
    evaluations=3,
    learning_rates=[0.02, 0.05],
    label_fractions=[1.0],
    seeds=[0, 1],
    pretrain_overrides=[
        "dataloader.train.total_batch_size=128",
        "dataloader.train.num_workers=4",
        "train.log_period=10",
        "train.checkpointer.period=0",
        "train.checkpoint_keep_every=0",
    ],
    finetune_overrides=[
        "model.roi_heads.num_classes=8",
        "dataloader.train.mapper.augmentations="
        "[{_target_:detectron2.data.transforms.RandomFlip,horizontal:true}]",
        "dataloader.test.mapper.augmentations=[]",
        "dataloader.train.num_workers=4",
        "train.amp.enabled=true",
        "train.precise_bn.num_iter=20",
        "train.log_period=10",
    ],
)
sweep["regions"] = dict(arguments=["--workers", "5"])
