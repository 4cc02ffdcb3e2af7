"""CCOP: curricular contrastive object-level pre-training (arXiv 2111.13651)."""

from region_pretrain.projects.ccop.build import ccop
from region_pretrain.projects.ccop.curriculum import Curriculum, Difficulty, Feedback
from region_pretrain.projects.ccop.meta_arch import CCOP
from region_pretrain.projects.ccop.views import CCOPViews

__all__ = ["CCOP", "CCOPViews", "Curriculum", "Difficulty", "Feedback", "ccop"]
