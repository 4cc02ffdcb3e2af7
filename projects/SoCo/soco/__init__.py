"""SoCo: selective object contrastive learning (arXiv 2106.02637)."""

from region_pretrain.projects.soco.build import soco
from region_pretrain.projects.soco.meta_arch import SoCo
from region_pretrain.projects.soco.views import SoCoViews, jitter_boxes

__all__ = ["SoCo", "SoCoViews", "jitter_boxes", "soco"]
