"""What the MCL recipes on Shapes share: small montages, a short run."""

from region_pretrain.config import get_config

from .mcl import dataloader, lr_multiplier, optimizer, train

DETECTOR = "detection/mask_rcnn_r18_fpn_shapes.py"
RATIOS = [1, 2, 4]

_shapes = get_config("common/shapes_pretrain.py")
dataloader.merge_with(_shapes.dataloader)
train.merge_with(_shapes.train)
_views = dataloader.train.dataset.views
# Canvases of 112 pixels: tiles of 112, 56, 28 on P4, P3, P2. P5 would need canvases of 224, four
# times the work; its output convolution keeps its initial weights.
_views.montage.update(size=112, ratios=RATIOS, images_per_canvas=[1, 4, 16])
_views.query_photometry.blur_sigma = (0.1, 1.0)  # (0.1, 2.0) scaled from views of 224 to 112 pixels
_views.key_photometry.blur_sigma = (0.1, 1.0)

optimizer.lr = 4.0  # 4.0 * 32 / 256 = 0.5
lr_multiplier.update(warmup_epochs=1, warmup_factor=0.01)
