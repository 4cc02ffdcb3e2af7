"""Point-level region contrast (arXiv 2202.04639)."""

from region_pretrain.projects.point_region_contrast.affinity_head import AffinityHead
from region_pretrain.projects.point_region_contrast.build import point_region
from region_pretrain.projects.point_region_contrast.contrast import PointContrast
from region_pretrain.projects.point_region_contrast.distillation import AffinityDistillation
from region_pretrain.projects.point_region_contrast.meta_arch import PointRegionContrast
from region_pretrain.projects.point_region_contrast.views import PointRegionViews

__all__ = [
    "AffinityDistillation",
    "AffinityHead",
    "PointContrast",
    "PointRegionContrast",
    "PointRegionViews",
    "point_region",
]
