"""Cityscapes instance segmentation, RGB: shorter side 800-1024 in training, 1024 in testing."""

from detectron2.config import LazyCall as L

from region_pretrain.yacs.build import build_evaluator

from .coco import dataloader

dataloader.train.dataset.names = "cityscapes_fine_instance_seg_train"
dataloader.train.mapper.augmentations[0].update(
    short_edge_length=[800, 832, 864, 896, 928, 960, 992, 1024], max_size=2048
)
dataloader.train.total_batch_size = 8
dataloader.test.dataset.names = "cityscapes_fine_instance_seg_val"
dataloader.test.mapper.augmentations[0].update(short_edge_length=1024, max_size=2048)
dataloader.evaluator = L(build_evaluator)(
    dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
)
