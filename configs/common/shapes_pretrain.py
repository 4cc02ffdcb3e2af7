"""What all pre-training recipes on Shapes share: 1,000 small scenes, minutes on two CPU cores.

A leaf merges it into its method's recipe: ``dataloader.merge_with(shapes.dataloader)``, and the
same for ``train``.
"""

from detectron2.config import LazyCall as L

from region_pretrain.data.shapes import shapes

dataloader = dict(
    train=dict(
        dataset=dict(names=L(shapes)(split="unlabeled", size=1000, side=96, level="easy")),
        total_batch_size=32,
        num_workers=1,
    ),
)
train = dict(
    epochs=10,  # 310 iters = 10 ep * 31 iters/ep (1,000 images // 32)
    amp=dict(enabled=False),
    channels_last=False,
    log_period=10,
    checkpointer=dict(period=100),
    checkpoint_keep_every=0,
)
