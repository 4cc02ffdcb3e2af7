"""AdamW for pre-training transformers and ConvNeXts with any method; the values are ours.

A config takes ``optimizer`` and ``lr_multiplier`` from here in place of its method's, and merges
``train`` into its own: ``train.merge_with(get_config("common/adamw_pretrain.py").train)``.
"""

from .optim import adamw as optimizer
from .schedule import pretrain as lr_multiplier

optimizer.lr = 5e-4
optimizer.weight_decay = 0.05
# 10 epochs of linear warm-up from 0, then a cosine to 1 % of the learning rate.
lr_multiplier.update(warmup_epochs=10, warmup_factor=0.0, final_factor=0.01)

train = dict(
    base_batch_size=256,
    amp=dict(enabled=True, dtype="bfloat16"),
    channels_last=False,
    clip_grad=dict(enabled=True, max_norm=3.0),
)
