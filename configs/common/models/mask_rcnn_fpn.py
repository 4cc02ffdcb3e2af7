"""Mask R-CNN R50-FPN for fine-tuning self-supervised weights."""

from .from_zoo import from_zoo

model = from_zoo("mask_rcnn_fpn")
