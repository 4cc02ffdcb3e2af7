"""BYOL's pair of photometric augmentations (arXiv 2006.07733, appendix B), one for each view."""

from detectron2.config import LazyCall as L

from region_pretrain.data.photometry import Photometry

_jitter = dict(
    brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1, jitter_prob=0.8, gray_prob=0.2
)
first = L(Photometry)(**_jitter, blur_prob=1.0, blur_sigma=(0.1, 2.0))
second = L(Photometry)(**_jitter, blur_prob=0.1, blur_sigma=(0.1, 2.0), solarize_prob=0.2)
