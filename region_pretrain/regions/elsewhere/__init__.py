"""Regions that another program computed: files of boxes, masks and label maps, and networks."""

from region_pretrain.regions.elsewhere.formats import FORMATS, load_boxes
from region_pretrain.regions.elsewhere.matching import attach, refuse_annotations
from region_pretrain.regions.elsewhere.recipe import DetectorRecipe, FeaturesRecipe, FileRecipe

__all__ = [
    "FORMATS",
    "DetectorRecipe",
    "FeaturesRecipe",
    "FileRecipe",
    "attach",
    "load_boxes",
    "refuse_annotations",
]
