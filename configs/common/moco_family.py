"""What MoCo v2 and the methods built on it share: optimiser, schedule, photometric augmentation.

SGD with learning rate 0.03 at batch size 256, weight decay on norms too, a cosine to 0 without
warm-up.
"""

from detectron2.config import LazyCall as L

from region_pretrain.data.photometry import Photometry

from .data.unlabeled import dataloader
from .optim import sgd as optimizer
from .schedule import pretrain as lr_multiplier
from .train import train

optimizer.lr = 0.03
optimizer.weight_decay = 1e-4
optimizer.params.weight_decay_norm = None  # null: norms decay like all other weights
train.base_batch_size = 256
train.cudnn_benchmark = True
lr_multiplier.update(warmup_epochs=0, final_factor=0.0)

dataloader.train.total_batch_size = 256
photometry = L(Photometry)(
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    jitter_prob=0.8,
    gray_prob=0.2,
    blur_prob=0.5,
    blur_sigma=(0.1, 2.0),
)
