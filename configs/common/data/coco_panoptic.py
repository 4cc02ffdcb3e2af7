"""COCO 2017 with instances and stuff, RGB: boxes and masks, and semantic segmentation maps.

``sem_seg_file_name`` of each image is made by Detectron2's ``datasets/prepare_panoptic_fpn.py``.
"""

from detectron2 import model_zoo
from detectron2.config import LazyCall as L

from region_pretrain.yacs.build import build_evaluator

dataloader = model_zoo.get_config("common/data/coco_panoptic_separated.py").dataloader
dataloader.train.mapper.image_format = "RGB"
dataloader.evaluator = L(build_evaluator)(
    dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
)
