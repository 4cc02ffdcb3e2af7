"""BYOL: bootstrap your own latent (arXiv 2006.07733)."""

from region_pretrain.projects.byol.build import byol
from region_pretrain.projects.byol.meta_arch import BYOL

__all__ = ["BYOL", "byol"]
