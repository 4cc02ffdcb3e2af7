"""LVIS v1 with masks, RGB: rare classes are oversampled (arXiv 1908.03195, appendix B)."""

from detectron2.config import LazyCall as L
from detectron2.data.samplers import RepeatFactorTrainingSampler

from region_pretrain.yacs.build import build_evaluator

from .coco import dataloader

dataloader.train.dataset.names = "lvis_v1_train"
dataloader.train.sampler = L(RepeatFactorTrainingSampler)(
    repeat_factors=L(RepeatFactorTrainingSampler.repeat_factors_from_category_frequency)(
        dataset_dicts="${dataloader.train.dataset}", repeat_thresh=0.001
    ),
    seed="${train.seed}",
)
dataloader.test.dataset.names = "lvis_v1_val"
dataloader.evaluator = L(build_evaluator)(
    dataset_name="${..test.dataset.names}", output_dir="${train.output_dir}/inference"
)
