"""MCL: multi-level contrastive learning for dense prediction (arXiv 2304.02010)."""

from region_pretrain.projects.mcl.build import (
    IMAGES_PER_CANVAS,
    mcl,
    supervised_mcl,
    tile_ratios,
)
from region_pretrain.projects.mcl.meta_arch import MCL
from region_pretrain.projects.mcl.montage import Montage
from region_pretrain.projects.mcl.param_groups import mcl_param_groups
from region_pretrain.projects.mcl.pseudo_levels import PseudoLevels
from region_pretrain.projects.mcl.supervised import SupervisedMCL
from region_pretrain.projects.mcl.views import MCLViews

__all__ = [
    "IMAGES_PER_CANVAS",
    "MCL",
    "MCLViews",
    "Montage",
    "PseudoLevels",
    "SupervisedMCL",
    "mcl",
    "mcl_param_groups",
    "supervised_mcl",
    "tile_ratios",
]
