"""COCO 2017 persons with 17 keypoints, RGB: images with at least one keypoint are trained on."""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L
from detectron2.data.detection_utils import create_keypoint_hflip_indices

dataloader = model_zoo.get_config("common/data/coco_keypoint.py").dataloader
dataloader.train.mapper.image_format = "RGB"
# Lazily, so that other data sets are flipped with their own pairs of keypoints.
dataloader.train.mapper.keypoint_hflip_indices = L(create_keypoint_hflip_indices)(
    dataset_names="${dataloader.train.dataset.names}"
)
# OKS sigma of each keypoint; empty: COCO's for the 17 of a person.
dataloader.evaluator.kpt_oks_sigmas = []
