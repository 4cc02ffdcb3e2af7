"""Optimisers, parameter groups and schedules."""

from region_pretrain.solver.lars import LARS
from region_pretrain.solver.param_groups import adamw_param_groups, pretrain_param_groups
from region_pretrain.solver.schedules import (
    check_schedule,
    cosine_momentum,
    warmup_cosine,
    warmup_multistep,
    warmup_times_cosine,
)

__all__ = [
    "LARS",
    "adamw_param_groups",
    "check_schedule",
    "cosine_momentum",
    "pretrain_param_groups",
    "warmup_cosine",
    "warmup_multistep",
    "warmup_times_cosine",
]
