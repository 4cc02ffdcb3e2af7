"""Optimisers. ``params.model`` is filled in by the engine."""

import torch
from detectron2.config import LazyCall as L
from detectron2.solver.build import get_default_optimizer_params

from region_pretrain.solver import LARS, adamw_param_groups, pretrain_param_groups

# lr is for batch size 256: set train.base_batch_size = 256 (8.0 at batch size 2048).
lars = L(LARS)(
    params=L(pretrain_param_groups)(weight_decay=1e-5),
    lr=1.0,
    momentum=0.9,
    trust_coefficient=0.001,
    eps=1e-8,
)

# Detectron2's optimiser for detection; lr is for batch size 16.
sgd = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(weight_decay_norm=0.0),
    lr=0.02,
    momentum=0.9,
    weight_decay=1e-4,
)

# For transformers and ConvNeXts. lr and weight_decay are ViTDet's, for batch size 64. The learning
# rate of each block is layer_decay times that of the block after it.
adamw = L(torch.optim.AdamW)(
    params=L(adamw_param_groups)(base_lr="${..lr}", layer_decay=1.0),
    lr=1e-4,
    betas=(0.9, 0.999),
    weight_decay=0.1,
)
