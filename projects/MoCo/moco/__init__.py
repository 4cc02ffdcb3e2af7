"""MoCo v2: momentum contrast of images (arXiv 1911.05722, 2003.04297)."""

from region_pretrain.projects.moco.build import moco
from region_pretrain.projects.moco.meta_arch import MoCo

__all__ = ["MoCo", "moco"]
