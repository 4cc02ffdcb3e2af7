"""COCO 2017 with masks, RGB: shorter side 640-800 in training, 800 in testing."""

from detectron2 import model_zoo

dataloader = model_zoo.get_config("common/data/coco.py").dataloader
dataloader.train.mapper.image_format = "RGB"
