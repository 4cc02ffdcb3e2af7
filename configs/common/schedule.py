"""Learning-rate multipliers."""

from detectron2.config import LazyCall as L

from region_pretrain.solver import warmup_cosine, warmup_multistep

# 10 epochs of linear warm-up from 1 % of the learning rate, then a cosine.
pretrain = L(warmup_cosine)(
    epochs="${train.epochs}",
    warmup_epochs=10,
    warmup_factor=0.01,
    final_factor=1.25e-7,
)

# 90000 iterations * 16 images / 118287 images of COCO train2017 = 12.2 epochs
detection_1x = L(warmup_multistep)(max_iter=90_000, steps=[60_000, 80_000])

detection_2x = L(warmup_multistep)(max_iter=180_000, steps=[120_000, 160_000])

# From 3x on, the drops keep the distance from the end that they have in 2x.
detection_3x = L(warmup_multistep)(max_iter=270_000, steps=[210_000, 250_000])
